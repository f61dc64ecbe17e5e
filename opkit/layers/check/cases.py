"""The cases that a check runs, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opkit.layers.op import AnyCase, Case, GemmCase, LaunchMode, MoeCase, Op, Phase
from opkit.layers.plan import PlannedCase


class Role(StrEnum):
    """What a case is run for."""

    CONTEXT = "context"  # one request of a middling length
    FIRST = "first token"  # one request, one token, nothing cached
    PREFIX = "cached prefix"  # the second half of CONTEXT's request, the first half cached
    MANY_CONTEXT = "large context batch"
    GENERATION = "generation"  # the last token of CONTEXT's request, all before it cached
    SECOND = "second token"  # one request, one token cached
    LONG = "long generation"  # past what a sparse attention picks from
    MANY_GENERATION = "large generation batch"
    GRAPH = "graph"  # GENERATION, replayed
    MANY_GRAPH = "large graph batch"  # MANY_GENERATION, replayed
    OWN = "own"  # cases that only this op has


@dataclass(frozen=True)
class Asked:
    """One case, and what it is for."""

    role: Role
    planned: PlannedCase[Any]

    def label(self) -> str:
        """The case as a report names it: ``generation 1 × 1 @ 255 (graph)``."""
        case = self.planned.case
        phase = f"{case.phase} " if isinstance(case, Case) else ""
        mode = " (graph)" if self.planned.mode is LaunchMode.GRAPH else ""
        return f"{phase}{case.label()}{mode}"


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        length: tokens of CONTEXT's request, at least 2.
        context_batch, generation_batch: requests of the large batches.
        past: tokens cached in LONG; 0 when GENERATION is long enough.
    """

    length: int
    context_batch: int
    generation_batch: int
    past: int = 0


# Some blocks of every engine's cache, and with the batch as many tokens as a step of a server has.
ON_GPU = Sizes(256, 16, 64)
ON_CPU = Sizes(64, 4, 8)  # seconds, not minutes, with a large model's layer on a few cores


def sizes_for(
    gpu: bool, config: Mapping[str, Any], captured: Mapping[str, int] | None = None
) -> Sizes:
    """Sizes for a machine and a model.

    Args:
        gpu: whether the mock runs on one.
        config: the model's ``config.json``; an indexer's ``index_topk`` in it asks for a past that
            is longer, because below it every token is picked and the indexer decides nothing.
        captured: tokens of each captured request, when only these can be run.
    """
    sizes = ON_GPU if gpu else ON_CPU
    topk = config.get("index_topk")
    past = topk + topk // 4 if isinstance(topk, int) and topk >= sizes.length else 0
    if captured is None:
        return Sizes(sizes.length, sizes.context_batch, sizes.generation_batch, past)
    length = max(2, min([sizes.length, *captured.values()]))
    requests = max(1, len(captured))
    longest = max(captured.values(), default=0)
    return Sizes(
        length,
        min(sizes.context_batch, requests),
        min(sizes.generation_batch, requests),
        past if past < longest else 0,
    )


def cases_of(op: Op, sizes: Sizes, graphs: bool, caches: bool) -> tuple[Asked, ...]:
    """The cases to run, cheap ones first.

    Args:
        op: the op.
        sizes: how large.
        graphs: whether CUDA graphs can be had here.
        caches: whether the op keeps anything from step to step.
    """
    context, generation = Phase.CONTEXT, Phase.GENERATION
    length, half = sizes.length, sizes.length // 2
    wanted: list[tuple[Role, AnyCase, LaunchMode]] = []

    def want(role: Role, case: AnyCase, mode: LaunchMode = LaunchMode.EAGER) -> None:
        if not isinstance(case, Case) or case.phase in op.phases:
            wanted.append((role, case, mode))

    want(Role.CONTEXT, Case(context, 1, length, 0))
    want(Role.FIRST, Case(context, 1, 1, 0))
    if caches:
        want(Role.PREFIX, Case(context, 1, length - half, half))
    want(Role.GENERATION, Case(generation, 1, 1, length - 1))
    want(Role.SECOND, Case(generation, 1, 1, 1))
    want(Role.MANY_CONTEXT, Case(context, sizes.context_batch, length, 0))
    want(Role.MANY_GENERATION, Case(generation, sizes.generation_batch, 1, length - 1))
    if sizes.past:
        want(Role.LONG, Case(generation, 1, 1, sizes.past))
    if graphs:
        want(Role.GRAPH, Case(generation, 1, 1, length - 1), LaunchMode.GRAPH)
        want(
            Role.MANY_GRAPH,
            Case(generation, sizes.generation_batch, 1, length - 1),
            LaunchMode.GRAPH,
        )
    for own in _own(op, sizes):
        want(Role.OWN, own)
    return tuple(Asked(role, PlannedCase(case, mode)) for role, case, mode in wanted)


def _own(op: Op, sizes: Sizes) -> tuple[AnyCase, ...]:
    """Cases of a kind that only this op has, as it is collected."""
    if op.name == "moe":
        return MoeCase(sizes.length), MoeCase(sizes.length, "power_law_1.2")
    if op.name == "gemm":
        return GemmCase(sizes.length, 512, 512), GemmCase(sizes.length, 512, 512, "float8_e4m3fn")
    return ()


def keeps_cache(op: Op) -> bool:
    """Whether the op has a KV cache: its tables then have a column for the cache's type."""
    return any("kv_cache_dtype" in table.columns for table in op.tables.values())
