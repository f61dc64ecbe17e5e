"""Every rule of the checklist passes a right mock, and fails the one that is wrong in its way."""

from __future__ import annotations

import pytest
from checked_mock import TinyMock, looked_at

from opkit.layers.check.cases import Asked, Role
from opkit.layers.check.judge import RULES
from opkit.layers.check.observe import Observer
from opkit.layers.check.result import Outcome
from opkit.layers.gemm import GEMM
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import PlannedCase

pytest.importorskip("torch", reason="torch is not installed: make test-torch")


def failed(mock: TinyMock) -> dict[str, str]:
    lines = looked_at(mock)
    assert list(lines) == list(RULES)
    for line in lines.values():
        if line.outcome is Outcome.FAIL:
            assert line.cause
            assert line.fix
    return {name: line.detail for name, line in lines.items() if line.outcome is Outcome.FAIL}


def test_a_right_mock_passes_everything() -> None:
    lines = looked_at(TinyMock())
    outcomes = {name: line.outcome for name, line in lines.items()}
    assert outcomes.pop("collected cases") is Outcome.NOT_APPLICABLE
    assert set(outcomes.values()) == {Outcome.PASS}, {n: line.detail for n, line in lines.items()}
    assert "bit for bit in 9 of 9 cases" in lines["repeatable"].detail


# fault → the rule that must fail, and a part of what it says. ``more``: rules that fail with it.
FAULTS = [
    ("raises", "forward", "ValueError: no metadata"),
    ("refuses", "forward", "max_num_seqs is 0"),
    ("nan input", "input format", "1 values are nan or infinite"),
    ("input type", "input format", "hidden_states is float64, the mock says float32"),
    ("scattered input", "input format", "do not lie side by side"),
    ("few rows", "input format", "has no row for each of 48"),
    ("equal rows", "input format", "100% of the sampled rows are equal"),
    ("wide", "output shape", "[48, 32] instead of [48, 64]"),
    ("no output", "output shape", "the forward returns nothing"),
    ("other type", "output dtype", "float64 instead of float32"),
    ("nan", "finite output", "1 of 3,072 values are nan or infinite"),
    ("all zeros", "finite output", "all zeros"),
    ("zero row", "finite output", "1 of 144 rows are all zeros"),
    ("no cache", "KV cache present", "the probe names no cache"),
    ("cache outside", "KV cache present", "has no block for 1 of the numbers"),
    ("not written", "KV cache written", "3 of 3 blocks stay blank"),
    ("not read", "KV cache read", "the output changes by 0.0e+00"),
    ("fails at length 1", "batch 1, length 1", "RuntimeError: a grid of no blocks"),
    ("zero row at length 1", "batch 1, length 1", "context 1 × 1: all zeros"),
    ("fails at batch", "large batch", "RuntimeError: out of workspace"),
    ("mixes requests", "large batch", "context 1 × 48 against context 3 × 48: max error"),
    ("no graph", "CUDA graph", "operation not permitted"),
    ("stale graph", "graph = eager", "generation 1 × 1 @ 47 (graph): max error"),
    ("drifts", "repeatable", "of the largest value (≤ 0.01 %)"),
    ("in place", "input untouched", "hidden_states is another after two forwards"),
    ("off by one", "context = generation", "context 1 × 48 against generation 1 × 1 @ 47"),
    ("other prompt", "context = generation", "other values of hidden_states"),
    ("zero weights", "operands", "q_proj.weight [64, 64] float32: 100% zeros"),
    ("no operands", "operands", "the mock samples no operand"),
    ("operands raise", "operands", "KeyError"),
]


@pytest.mark.parametrize(("fault", "rule", "said"), FAULTS, ids=[f"{r}: {f}" for f, r, _ in FAULTS])
def test_a_wrong_mock_fails_the_rule_that_is_for_it(fault: str, rule: str, said: str) -> None:
    wrong = failed(TinyMock(fault))
    assert rule in wrong
    assert said in wrong[rule]


def test_keys_that_change_no_score_count_as_read_when_large_ones_do() -> None:
    """An engine's dummy weights make keys of 1e-3: zeros in their place change no bit.

    Seen on an H100: SGLang 0.5.14 keeps keys and values apart, and `opkit check gqa` failed there
    (every change of k_cache was 0.0) for a mock that was right.
    """
    lines = looked_at(TinyMock(faint=True))
    read = lines["KV cache read"]
    assert read.outcome is Outcome.PASS, read.detail
    assert "k_cache, v_cache" in read.detail
    assert {n for n in read.numbers if n.endswith("k_cache") and "@" in n}
    assert min(n["change"] for n in read.numbers.values() if "change" in n) > 0.01


def test_faint_keys_that_are_not_read_are_still_found() -> None:
    wrong = failed(TinyMock("keys not read", faint=True))
    assert "k_cache may hold anything: the output changes by 0.0e+00" in wrong["KV cache read"]
    assert "v_cache" not in wrong["KV cache read"]


def test_cases_that_only_an_op_has_are_run_too() -> None:
    line = looked_at(TinyMock(), op=GEMM)["collected cases"]  # it knows no GemmCase
    assert line.outcome is Outcome.FAIL
    assert line.detail.startswith("48 × 512 × 512 bfloat16: AttributeError")


def test_every_rule_has_a_failing_example() -> None:
    assert {rule for _, rule, _ in FAULTS} | {"collected cases"} == set(RULES)


@pytest.mark.parametrize(
    ("fault", "rules"),
    [
        # Nothing but the rule itself: the checks do not spoil one another.
        ("in place", {"input untouched", "repeatable"}),
        ("not read", {"KV cache read", "context = generation"}),
        ("stale graph", {"graph = eager"}),
        ("mixes requests", {"large batch"}),
        ("off by one", {"context = generation", "batch 1, length 1"}),
        ("zero weights", {"operands"}),
        ("cache outside", {"KV cache present"}),
    ],
)
def test_a_fault_fails_only_what_it_is_about(fault: str, rules: set[str]) -> None:
    assert set(failed(TinyMock(fault))) <= rules


def test_what_the_mock_says_of_a_refusal_is_the_fix() -> None:
    assert looked_at(TinyMock("refuses"))["forward"].fix == "raise --max-num-seqs"


def test_an_engine_without_cached_prefixes_is_no_failure() -> None:
    lines = looked_at(TinyMock("no prefix"))
    assert lines["forward"].outcome is Outcome.PASS
    assert "left out: this engine caches no prefixes" in lines["forward"].detail


def test_other_inputs_for_the_same_tokens_are_no_failure_where_none_were_promised() -> None:
    line = looked_at(TinyMock("other prompt"), inputs="normal")["context = generation"]
    assert line.outcome is not Outcome.FAIL


def test_inputs_that_were_rounded_otherwise_are_the_same_tokens() -> None:
    """On an H100 vLLM's fused projection is another kernel for another batch."""
    assert failed(TinyMock("rounded input")) == {}


def test_a_look_leaves_caches_and_inputs_as_they_were() -> None:
    mock = TinyMock()
    planned = PlannedCase(Case(Phase.GENERATION, 2, 1, 40), LaunchMode.EAGER)
    mock.prepare(planned)()
    cache, hidden = mock.cache.clone(), mock.hidden.clone()
    seen = Observer(mock, lambda _: None).observe(Asked(Role.MANY_GENERATION, planned))
    assert [(c.new, c.written, c.past) for c in seen.caches] == [(2, 2, 4)]
    assert mock.torch.equal(mock.cache, cache)
    assert mock.torch.equal(mock.hidden, hidden)
