"""Likely causes and next steps for what a check found, as the field's checklists name them. Data
only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opkit.align.result import KernelPair, Level


@dataclass(frozen=True)
class Advice:
    """A likely cause, and what to do about it."""

    cause: str
    next_step: str


OTHER_KV_LAYOUT = Advice(
    "the KV cache has another dtype or layout on one side (--kv-cache-dtype)",
    "give the mock the server's KV cache dtype",
)
NO_KV_CACHE = Advice(
    "the mock has no KV cache manager, or never writes its cache",
    "build and bind the cache as the engine does, and pass slot mappings",
)
NO_INDEXER = Advice(
    "the mock skips the indexer or its top-k (or lies on the other side of index_topk)",
    "build the layer with its indexer, at the sequence lengths that the engine ran",
)
OTHER_DTYPE = Advice(
    "weights, norms or activations have another element type on one side",
    "build the mock in the server's dtype and quantisation",
)
EXTRA_GLUE = Advice(
    "extra work inside the mock's measured region: initialisation, a cast, an unfused "
    "element-wise op",
    "move preparation out of the region, or call the engine's fused path",
)
MISSING_GLUE = Advice(
    "the engine converts or copies data that the mock feeds ready-made",
    "feed the mock what the engine's layer gets, in dtype, layout and strides",
)
SPLIT_FUSED = Advice(
    "a fused kernel on one side runs as several kernels on the other",
    "use the engine's own module and compilation settings in the mock",
)
OTHER_SHAPE = Advice(
    "mock and engine ran other shapes: batch, new tokens or cached tokens",
    "run the mock at the shape named for E2E: `opkit align` with --e2e-trace and no --mock-trace "
    "does",
)
OTHER_GRIDS = Advice(
    "other grids or blocks at shapes of one name: another local head count (tensor parallelism) "
    "on one side, or another batch or length than it says",
    "compare tp and the sizes in the report's model line, which are the mock's, with the server's "
    "command",
)
AUTOTUNED = Advice(
    "at equal shapes only Triton's kernels have other grids or blocks: probably autotuned, on each "
    "host anew",
    "record mock and engine on one host, with one Triton cache; if it stays, compare tp and sizes",
)
OTHER_FRAMEWORK = Advice(
    "the mock is of one framework and the engine of another",
    "run the mock with the engine's framework: `--e2e-trace` alone does, with `--python`",
)
FOLLOWS_FRAMEWORK = Advice(
    "follows from the other framework (see evidence)",
    OTHER_FRAMEWORK.next_step,
)
UNFUSED_NORM = Advice(
    "a norm runs as several operations on one side: its weight or computation has another dtype "
    "there, or the fused kernel is not used",
    "build the mock's norms with the engine's own class, in the model's dtype",
)
FOLLOWS_SHAPE = Advice(
    "probably follows from the other shape or grids (see launch)",
    "mend first what launch names",
)
COMMUNICATION = Advice(
    "the engine ran with tensor parallelism: its communication is no part of the op",
    "compare against a run of one rank, or declare the kernels as roles in a policy",
)
OTHER_KERNEL = Advice(
    "another kernel was chosen for the same role (other shape, quantisation, backend or tuner "
    "cache)",
    "compare shapes, dtypes, attention backend and tuner cache of both sides",
)
OTHER_ORDER = Advice(
    "the same kernels run in another order",
    "check streams and the order of calls in the mock's forward",
)
EAGER_NOT_GRAPH = Advice(
    "eager launches on one side, CUDA graph replay on the other",
    "run the mock in the engine's launch mode",
)
OPERAND_DATA = Advice(
    "operand data or clock: all heavy kernels scale alike (degenerate operands toggle fewer bits "
    "and run faster)",
    "check weights and activations of the mock (operands in the report), and the clocks of both "
    "runs",
)
DATA_DEPENDENT = Advice(
    "these kernels' time depends on operand values (ties, locality), and the values differ",
    "give mock and engine the same weights and the same kind of activations",
)
FOLLOWS_KERNELS = Advice(
    "other kernels run, and their time is other",
    "mend names, counts and missing/extra first",
)
UNKNOWN_LENGTH = Advice(
    "the cache length of these decode steps is unknown (no requests are recorded, or they do not "
    "add up to the step labels), and grids and times follow from it",
    "record with `opkit align --e2e-cmd`, and slim with --modules rather than --steps",
)
ROUTING = Advice(
    "the mock's tokens met another number of experts than the engine's, whose weights are the time",
    "align with --inputs captured: the engine's own hidden states, so the router's own choices",
)
DEGENERATE = Advice(
    "the mock's operands are degenerate (zeros, or equal rows)",
    "fill weights as the engine does, and feed rows that differ",
)
SLOW_SIDE = Advice(
    "same kernels, other time: clocks, power, cache state, or another process on the GPU",
    "run again on an idle GPU; compare clocks of both runs",
)

_INDEXER_WORDS = ("topk", "mqa_logits", "indexer", "top_k")


def advise_names(pairs: Sequence[KernelPair]) -> Advice:
    """The likeliest cause of kernels that stand on one side only or differ in element type."""
    if any(p.level is Level.DTYPE for p in pairs):
        return OTHER_DTYPE
    mock_only = [p for p in pairs if p.level is Level.MOCK_ONLY]
    e2e_only = [p for p in pairs if p.level is Level.E2E_ONLY]
    if {p.name for p in mock_only} & {p.name for p in e2e_only}:
        return OTHER_ORDER
    missing = _families(e2e_only)
    extra = _families(mock_only)
    if "kv cache" in missing and "kv cache" in extra:
        return OTHER_KV_LAYOUT
    if any(word in p.name.lower() for p in e2e_only for word in _INDEXER_WORDS):
        return NO_INDEXER
    if "kv cache" in missing and not extra:
        return NO_KV_CACHE
    if "norm" in missing and "norm" not in extra and extra & {"reduce", "cast", "elementwise"}:
        return UNFUSED_NORM
    if missing & {"nccl", "all-reduce", "fused all-reduce"} and not extra:
        return COMMUNICATION
    if mock_only and all(p.glue for p in mock_only) and not e2e_only:
        return EXTRA_GLUE
    if e2e_only and all(p.glue for p in e2e_only) and not mock_only:
        return MISSING_GLUE
    if len(mock_only) != len(e2e_only):
        return SPLIT_FUSED
    return OTHER_KERNEL


def _families(pairs: Sequence[KernelPair]) -> set[str]:
    return {side.family for p in pairs for side in (p.mock, p.e2e) if side is not None}
