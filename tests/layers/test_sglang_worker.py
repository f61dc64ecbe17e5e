"""Where SGLang's mock puts the tokens of a case. With torch, without SGLang."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import fake_sglang
import pytest

from opkit.errors import BadInput
from opkit.layers.manifest import Answer
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.prompts import Sequences, prompt_tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

PAGE, SLOTS, VOCAB = 4, 64, 50
DECODE = Case(Phase.GENERATION, 2, 1, 6)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker around a runner that only remembers its steps."""
    fake_sglang.install(monkeypatch)
    module = importlib.import_module("opkit.layers.backends.sglang.worker")
    made = module.LayerWorker.__new__(module.LayerWorker)
    steps: list[Any] = []
    made.plan = Plan("dsa", "sglang", "m", (PlannedCase(DECODE, LaunchMode.EAGER),), "m.json")
    made.args = SimpleNamespace(
        chunked_prefill_size=4, max_prefill_tokens=16, context_length=32, max_running_requests=None
    )
    made.page, made.prepared, made.step = PAGE, None, None
    made.sequences = Sequences(made.plan.seed, VOCAB)
    table = SimpleNamespace(req_to_token=torch.zeros(5, 32, dtype=torch.int32), size=4)

    def forward(batch: Any) -> Any:
        steps.append(batch)
        made.model.last = SimpleNamespace(calls=(), batch=batch)
        return SimpleNamespace(can_run_graph=False)

    made.runner = SimpleNamespace(
        device="cpu",
        req_to_token_pool=table,
        token_to_kv_pool_allocator=None,
        model_config=SimpleNamespace(vocab_size=VOCAB, context_len=32),
        max_total_num_tokens=SLOTS,
        attn_backend="attention",
        eager_runner="eager",
        decode_cuda_graph_runner="graphs",
        forward=forward,
    )
    made.model = SimpleNamespace(last=None, launch=lambda step: step)
    made.steps = steps
    return made


def test_a_prefill_step_is_described_as_the_scheduler_does(worker: Any) -> None:
    batch = worker.batch(Case(Phase.CONTEXT, 2, 3, 2), range(2), 2, 3)
    assert batch.forward_mode == "extend"
    assert batch.input_ids.tolist() == [
        *prompt_tokens(0, 0, 5, VOCAB)[2:], *prompt_tokens(0, 1, 5, VOCAB)[2:]
    ]  # fmt: skip
    # Five tokens are two pages; page 0 is the engine's own.
    assert batch.out_cache_loc.tolist() == [6, 7, 8, 14, 15, 16]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [5, 5]
    assert (batch.prefix_lens, batch.extend_lens) == ([2, 2], [3, 3])
    assert (batch.extend_num_tokens, batch.seq_lens_sum) == (6, 10)
    assert batch.req_pool_indices.tolist() == [1, 2]  # row 0 is for padding
    table = worker.runner.req_to_token_pool.req_to_token
    assert table[1, :5].tolist() == [4, 5, 6, 7, 8]
    assert table[2, :5].tolist() == [12, 13, 14, 15, 16]
    assert table[0].tolist() == [0] * 32


def test_a_decode_step_has_one_token_a_request(worker: Any) -> None:
    batch = worker.batch(DECODE, range(2), 6, 1)
    assert batch.forward_mode == "decode"
    assert batch.input_ids.tolist() == [prompt_tokens(0, r, 7, VOCAB)[6] for r in range(2)]
    assert batch.out_cache_loc.tolist() == [10, 18]
    assert batch.seq_lens.tolist() == [7, 7]
    assert not hasattr(batch, "extend_lens")


def test_the_past_is_prefilled_in_the_servers_chunks_at_the_cases_places(worker: Any) -> None:
    worker.prepare(PlannedCase(DECODE, LaunchMode.EAGER))
    filled = [(batch.prefix_lens, batch.extend_lens, *batch.req_pool_indices.tolist())
              for batch in worker.steps[:-1]]  # fmt: skip
    assert filled == [([0], [4], 1), ([4], [2], 1), ([0], [4], 2), ([4], [2], 2)]
    places = [place for batch in worker.steps[:-1] for place in batch.out_cache_loc.tolist()]
    assert places == [*range(4, 10), *range(12, 18)]
    assert worker.steps[-1].forward_mode == "decode"
    assert worker.runner.decode_cuda_graph_runner == "graphs"  # put back after an eager step


def test_caches_are_counted_in_slots_or_pages(worker: Any) -> None:
    worker.prepare(PlannedCase(DECODE, LaunchMode.EAGER))
    slots, pages = torch.zeros(SLOTS + PAGE, 1, 8), torch.zeros(SLOTS // PAGE + 1, 8)
    by_slot, by_page = worker.cache_views({"kv_cache": slots, "indexer_cache": pages})
    assert by_slot.new == (10, 18)
    assert by_slot.past == (*range(4, 10), *range(12, 18))
    assert by_page.new == (2, 4)
    assert by_page.past == (1, 3)  # pages 2 and 4 hold cached tokens and new ones


def test_a_decode_step_runs_the_engines_own_token(worker: Any) -> None:
    worker.sequences = Sequences(0, VOCAB, (Answer(5, ((41, 42), (43, 44))),))
    worker.prepare(PlannedCase(DECODE, LaunchMode.EAGER))  # at 6 cached tokens
    assert worker.steps[-1].input_ids.tolist() == [42, 44]
    filled = worker.steps[0].input_ids.tolist() + worker.steps[1].input_ids.tolist()
    assert filled == [*prompt_tokens(0, 0, 5, VOCAB)[:4], prompt_tokens(0, 0, 5, VOCAB)[4], 41]


def test_pooled_caches_read_no_past(worker: Any) -> None:
    worker.plan = Plan("dsa", "sglang", "m", worker.plan.cases, "m.json", caches="pooled")
    worker.prepare(PlannedCase(DECODE, LaunchMode.EAGER))
    assert len(worker.steps) == 1
    assert worker.steps[0].input_ids.tolist() == [prompt_tokens(0, r, 1, VOCAB)[0] for r in (0, 1)]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(Phase.CONTEXT, 4, 20, 0), "KV pool is 64"),
        (Case(Phase.GENERATION, 1, 1, 32), "context length is 32"),
        (Case(Phase.GENERATION, 5, 1, 2), "table of requests is 4"),
    ],
)
def test_what_does_not_fit_is_refused(worker: Any, case: Case, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        worker.prepare(PlannedCase(case, LaunchMode.EAGER))
    assert worker.steps == []


def test_no_prefill_is_replayed(worker: Any) -> None:
    with pytest.raises(BadInput, match="compiled pieces"):
        worker.prepare(PlannedCase(Case(Phase.CONTEXT, 1, 4, 0), LaunchMode.GRAPH))


def test_a_decode_step_that_has_no_graph_is_told(worker: Any) -> None:
    with pytest.raises(BadInput, match="not replayed from a graph"):
        worker.prepare(PlannedCase(DECODE, LaunchMode.GRAPH))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case(Phase.CONTEXT, 2, 3, 0), "chunked_prefill_size is 4"),
        (Case(Phase.GENERATION, 1, 1, 40), "context length is 32"),
    ],
)
def test_what_the_scheduler_would_not_run_is_refused(worker: Any, case: Case, said: str) -> None:
    worker.plan = Plan("dsa", "sglang", "m", (PlannedCase(case, LaunchMode.EAGER),), "m.json")
    with pytest.raises(BadInput, match=said):
        worker._check_cases()
