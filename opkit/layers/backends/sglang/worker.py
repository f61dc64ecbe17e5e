"""SGLang's own model runner, driven step by step around a model of one layer.

Everything around the op is the engine's own code: its argument parser, its model runner (device,
process group, dummy weights, KV pools, attention backend and metadata), its decode graph runner
with its padding. opkit only takes the scheduler's place: it says which tokens of which request run
in a step, and where they lie in the pools.

Source: SGLang 0.5.14, ``managers/schedule_batch.py`` (``prepare_for_extend``,
``prepare_for_decode``) for what a step is described by, ``bench_one_batch.py`` for how a runner is
driven without a scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from opkit.errors import BadInput, ToolMissing
from opkit.layers.backends.sglang import engine
from opkit.layers.backends.sglang.config import layer_args, server_flags
from opkit.layers.backends.sglang.models import OneLayer, Step, overwrite
from opkit.layers.backends.shared import loads_checkpoint
from opkit.layers.mock import CacheView, Forward
from opkit.layers.op import Case, LaunchMode, Op, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.prompts import Sequences

# Tokens of the request whose entries fill pooled caches: four times what DSA's top-k picks.
_POOL_TOKENS = 8192


class LayerWorker:
    """A model runner of SGLang that holds one layer and runs the cases of a plan through it."""

    def __init__(
        self,
        plan: Plan,
        op: Op,
        paths: Sequence[str],
        overrides: Mapping[str, Any] | None = None,
        layer: int = 0,
    ) -> None:
        """Bring the runner up to where the engine begins to serve.

        Args:
            plan: what to run.
            op: whose sizes a rank has its share of.
            paths: the op's modules below a decoder layer.
            overrides: further values for ``config.json``.
            layer: whose weights a checkpoint gives.

        Raises:
            BadInput: flags or cases that this server could not run.
            ToolMissing: no GPU is visible.
        """
        engine.environment()
        self.plan = plan
        self.flags = server_flags(plan)
        if self.flags.device in (None, "cuda") and not torch.cuda.is_available():
            raise ToolMissing("no CUDA GPU is visible to torch on this host")
        self.load_format = self.flags.load_format  # the server's
        self.checkpoint = loads_checkpoint(plan, self.load_format)
        self.args = layer_args(plan, op, self.flags, overrides)
        self.prepared: PlannedCase[Any] | None = None
        self.step: Step | None = None
        self._check_cases()
        try:
            self.runner = engine.start(self.args, paths, layer, self._graphs())
        except BaseException:
            engine.end()
            raise
        vocab = int(self.runner.model_config.vocab_size)
        self.sequences = Sequences(plan.seed, vocab, plan.answers)
        self.model: OneLayer = self.runner.model
        self.model.recipe = plan.inputs
        if self.runner.is_hybrid_swa:
            raise BadInput("SGLang's pools for sliding windows are not mocked yet")
        self.page = self.runner.page_size
        if plan.caches == "pooled":
            self._fill_pool()

    def prepare(self, planned: PlannedCase[Case]) -> Forward:
        """Fill the caches, run the step once, and return a function that runs the op again.

        Raises:
            BadInput: the server's own flags do not allow this case or this launch mode.
        """
        case = planned.case
        self._check_room(case)
        self.sequences.select(case)
        if planned.mode is LaunchMode.GRAPH and case.phase is Phase.CONTEXT:
            raise BadInput(
                "SGLang replays prefill only from compiled pieces of a graph, which the mock does "
                "not have",
                "use mode eager, and align with a server of --disable-piecewise-cuda-graph",
            )
        with torch.no_grad():
            if self.plan.caches == "prefilled":
                self._fill_caches(case)
            batch = self.batch(case, range(case.batch), case.past, case.tokens)
            if planned.mode is LaunchMode.EAGER:
                with self._eager_launches():
                    self.runner.forward(batch)
                assert self.model.last is not None
                self.step = self.model.last
                forward = self.eager(self.step)
            else:
                forward = self._replay(batch, case)
            forward()  # what the engine makes once a step, in its first layer, is made here
        self.prepared = planned
        self.synchronize()
        return forward

    def eager(self, step: Step) -> Forward:
        """A function that launches the op's modules with what ``step`` called them with."""
        context = ForwardContext(attn_backend=self.runner.attn_backend)

        def forward() -> Any:
            with torch.no_grad(), forward_context(context):
                return self.model.launch(step)

        return forward

    def batch(self, case: Case, requests: Sequence[int], computed: int, tokens: int) -> Any:
        """A step as the engine describes it: new tokens of requests after ``computed`` cached ones.

        Every request has a row of its own in the engine's table of tokens, and consecutive pages,
        as a fresh pool hands them out; they stay valid within a case.
        """
        runner, device, count = self.runner, self.runner.device, len(requests)
        total = computed + tokens
        places = torch.stack([self._places(case, request, total) for request in requests])
        rows = torch.tensor([1 + request for request in requests], dtype=torch.int64)
        rows = rows.to(device)
        runner.req_to_token_pool.req_to_token[rows, :total] = places.to(device, torch.int32)
        lengths = torch.full((count,), total, dtype=torch.int64)
        ids = [self._prompt(request, computed, tokens)[computed:] for request in requests]
        context = case.phase is Phase.CONTEXT
        schedule = ScheduleBatch(
            reqs=[],
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            model_config=runner.model_config,
            device=device,
            forward_mode=ForwardMode.EXTEND if context else ForwardMode.DECODE,
            input_ids=torch.tensor(ids, dtype=torch.int64).flatten().to(device),
            req_pool_indices=rows,
            seq_lens=lengths.to(device),
            seq_lens_cpu=lengths,
            seq_lens_sum=total * count,
            orig_seq_lens=lengths.to(device, torch.int32),
            out_cache_loc=places[:, computed:].flatten().to(device, torch.int64),
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        if context:
            schedule.prefix_lens = [computed] * count
            schedule.extend_lens = [tokens] * count
            schedule.extend_logprob_start_lens = [0] * count
            schedule.extend_num_tokens = tokens * count
        return ForwardBatch.init_new(schedule, runner)

    def cache_views(self, buffers: Mapping[str, Any]) -> tuple[CacheView, ...]:
        """The op's caches, with the slots or pages of the prepared case's new and past tokens.

        Args:
            buffers: each cache by name; its first dimension counts slots (one a token) or pages.
        """
        assert self.prepared is not None
        case = self.prepared.case
        slots = self.runner.max_total_num_tokens
        views = []
        for name, buffer in buffers.items():
            size = 1 if buffer.shape[0] >= slots else self.page
            new: set[int] = set()
            past: set[int] = set()
            for request in range(case.batch):
                places = self._places(case, request, case.past + case.tokens).tolist()
                new |= {place // size for place in places[case.past :]}
                past |= {place // size for place in places[: case.past]}
            views.append(CacheView(name, buffer, tuple(sorted(new)), tuple(sorted(past - new))))
        return tuple(views)

    def synchronize(self) -> None:
        """Wait for the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def close(self) -> None:
        """End the process group and give the GPU's memory back, for the next build."""
        graphs = self.runner.decode_cuda_graph_runner
        if hasattr(graphs, "backend"):
            graphs.backend.cleanup()
        self.step = self.prepared = None
        del self.model, self.runner
        engine.end()

    def _graphs(self) -> bool:
        """Whether the plan needs the engine's decode graphs."""
        return any(
            item.mode is LaunchMode.GRAPH and isinstance(item.case, Case)
            for item in self.plan.cases
        )

    def _replay(self, batch: Any, case: Case) -> Forward:
        """The engine's replay of the decode graph for ``batch``, over the step's own inputs."""
        if not self.runner.forward(batch).can_run_graph:
            raise BadInput(
                f"with the server's flags {case.phase} {case.label()} is not replayed from a "
                "graph, but the plan asks for mode graph"
            )
        graphs = self.runner.decode_cuda_graph_runner
        self.step = self.model.captured[graphs.bs * graphs.num_tokens_per_bs]
        fed = self.step.batch
        # The graph begins at the op: what stands before it runs here, over the padded batch.
        with forward_context(ForwardContext(attn_backend=graphs.attn_backend)):
            overwrite(self.step.calls, self.model.record(fed.input_ids, fed.positions, fed))
        key, rows = graphs._replay_graph_key, batch.batch_size

        def forward() -> Any:
            return graphs.backend.replay(key, batch).hidden_states[:rows]

        return forward

    def _check_cases(self) -> None:
        """Refuse, before the GPU is touched, what this server's scheduler would never run."""
        chunk = self.args.chunked_prefill_size
        for item in self.plan.cases:
            case = item.case
            if not isinstance(case, Case):
                continue
            limits = [(case.past + case.tokens, self.args.context_length, "context length")]
            limits.append((case.batch, self.args.max_running_requests, "max_running_requests"))
            if case.phase is Phase.CONTEXT and chunk and chunk > 0:
                limits.append((case.batch * case.tokens, chunk, "chunked_prefill_size"))
            for value, limit, name in limits:
                if limit is not None and value > limit:
                    raise BadInput(
                        f"{case.phase} {case.label()} needs {value:,}, the server's {name} is "
                        f"{limit:,}"
                    )

    def _check_room(self, case: Case) -> None:
        """Raise BadInput when the pools cannot hold the case."""
        runner = self.runner
        need = case.batch * self._pages(case) * self.page
        room, longest = runner.max_total_num_tokens, runner.model_config.context_len
        for value, limit, name in (
            (need, room, "KV pool"),
            (case.past + case.tokens, longest, "context length"),
            (case.batch, runner.req_to_token_pool.size, "table of requests"),
        ):
            if value > limit:
                raise BadInput(
                    f"{case.phase} {case.label()} needs {value:,}, the {name} is {limit:,}"
                )

    def _pages(self, case: Case) -> int:
        """Pages that one request of ``case`` fills."""
        return -(-(case.past + case.tokens) // int(self.page))

    def _places(self, case: Case, request: int, length: int) -> Any:
        """Pool slots of a request's first tokens, int64 [length]; page 0 is the engine's own."""
        first = (1 + request * self._pages(case)) * self.page
        return torch.arange(first, first + length, dtype=torch.int64)

    @contextmanager
    def _eager_launches(self) -> Iterator[None]:
        """Make the runner choose no graph."""
        runner = self.runner
        kept, runner.decode_cuda_graph_runner = runner.decode_cuda_graph_runner, runner.eager_runner
        try:
            yield
        finally:
            runner.decode_cuda_graph_runner = kept

    def _chunk(self) -> int:
        """Most tokens that the server prefills in one step."""
        chunk = self.args.chunked_prefill_size
        return int(chunk) if chunk and chunk > 0 else int(self.args.max_prefill_tokens)

    def _fill_caches(self, case: Case) -> None:
        """Prefill what the case has behind it, request by request, in steps the server allows."""
        limit = self._chunk()
        for request in range(case.batch):
            for start in range(0, case.past, limit):
                count = min(limit, case.past - start)
                self.runner.forward(self._prefill(case, request, start, count))

    def _prefill(self, case: Case, request: int, start: int, count: int) -> Any:
        """A prefill step of one request whose places are those that it has in ``case``."""
        return self.batch(replace(case, phase=Phase.CONTEXT), [request], start, count)

    def _fill_pool(self) -> None:
        """Prefill one long request and repeat its entries over the whole pool.

        The values are the op's own, so nothing that depends on them (top-k, gathers) sees zeros or
        ties; an entry's rotary phase is that of its place in the long request.
        """
        limit = self._chunk()
        longest = self.runner.model_config.context_len
        room = self.runner.max_total_num_tokens
        length = min(_POOL_TOKENS, longest - 1, room) // self.page * self.page
        case = Case(Phase.CONTEXT, 1, length, 0)
        with torch.no_grad():
            for start in range(0, length, limit):
                self.runner.forward(self._prefill(case, 0, start, min(limit, length - start)))
            for buffer in pool_buffers(self.runner.token_to_kv_pool):
                size = 1 if buffer.shape[0] >= room else self.page
                first, count = self.page // size, length // size
                source = buffer[first : first + count]
                for start in range(first + count, buffer.shape[0], count):
                    part = buffer[start : start + count]
                    part.copy_(source[: part.shape[0]])
        self.synchronize()

    def _prompt(self, request: int, computed: int, tokens: int) -> list[int]:
        """The first ``computed + tokens`` token ids of a request.

        With pooled caches nothing before ``computed`` is read again, so one id stands for all.
        """
        if self.plan.caches == "pooled" and computed:
            return [0] * computed + self.sequences.tokens(request, tokens)
        return self.sequences.tokens(request, computed + tokens)


def pool_buffers(pool: Any) -> list[Any]:
    """The tensors of a KV pool's only layer, whatever kind of pool it is."""
    names = ("kv_buffer", "k_buffer", "v_buffer", "index_k_with_scale_buffer")
    return [getattr(pool, name)[0] for name in names if hasattr(pool, name)]
