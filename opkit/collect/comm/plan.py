"""What will be measured: options, cases with their keys, worlds of ranks, and an estimate.

A *world* is one set of processes, one a GPU, that measures the cases of one implementation and one
number of GPUs. A fresh world costs a start (torch, communicators), so it takes all its cases.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opkit.collect.comm.sizes import (
    ALIASES,
    CUSTOM_SPAN,
    ITEM_BYTES,
    NCCL_SPAN,
    OPS,
    Message,
    Span,
    bus_factor,
    message,
)
from opkit.collect.measurement import Timing, digest_text
from opkit.errors import BadInput, ToolMissing, WrongUsage
from opkit.layers.op import LaunchMode

DTYPES = ("half", "int8")  # of the nccl table
DEVICES = ("cuda", "cpu")
CUSTOM_BACKENDS = ("vllm", "trtllm")
CUSTOM_DTYPE = "bfloat16"  # of the field's custom_allreduce tables; their reader ignores it
# An iteration is one batch of launches. Before each the ranks are aligned and the GPUs have
# waited for it, hence burst.
TIMING = Timing(
    pacing="burst",
    l2="warm",
    warmups=3,
    min_iterations=20,
    max_iterations=200,
    spread=0.005,
    max_seconds=1.0,
    gpu_time=False,
)
MOST_LAUNCHES = 20  # in a batch: enough that the batch's own start weighs little
FEWEST_LAUNCHES = 2
BATCH_BYTES = 32 * 1024**2  # an all-reduce in place needs a buffer a launch; they stay within L2

# For the estimate only. Guesses of the right order, not measured by opkit.
WORLD_SECONDS = 25.0  # torch imported, communicators made
CASE_SECONDS = 0.2  # buffers, check, capture
BATCH_SECONDS = 0.001  # refill, alignment, synchronisation
START_SECONDS = 10e-6  # of a collective of no size
BUS_BYTES_PER_SECOND = 2e11


@dataclass(frozen=True)
class CommOptions:
    """What was asked for.

    Attributes:
        out: output folder.
        gpus: numbers of GPUs to measure between; empty: 2, 4, 8 … up to those present.
        ops: collectives; empty: all, or none when ``all_reduce_backend`` is given.
        dtypes: of the collectives.
        min_bytes, max_bytes: size of the whole buffer; None: as the field's table has it.
        factor: from one size to the next.
        all_reduce_backend: engine whose own all-reduce is measured: ``vllm``, ``trtllm`` or none.
        device: ``cuda``, or ``cpu`` (gloo; it tests everything but numbers).
        python: interpreter that has torch and the engine.
        timing: how; an iteration is a batch of launches.
        case_limit_s: a case that takes longer is ended, with its world.
        start_limit_s: a world that takes longer to start is ended.
        seed: of the data.
    """

    out: Path
    gpus: tuple[int, ...] = ()
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = DTYPES
    min_bytes: int | None = None
    max_bytes: int | None = None
    factor: int = 2
    all_reduce_backend: str = ""
    device: str = "cuda"
    python: str = sys.executable
    timing: Timing = field(default_factory=lambda: TIMING)
    case_limit_s: float = 60.0
    start_limit_s: float = 300.0
    seed: int = 0


@dataclass(frozen=True)
class CommCase:
    """One row to be.

    Attributes:
        implementation: ``nccl``, ``gloo``, ``vllm`` or ``trtllm``.
        op: the collective, as the table names it.
        dtype: of an element, as the table names it.
        ranks: processes, one a GPU.
        size: bytes of the whole buffer that were asked for; ``message()`` says what it holds.
        launch: graph (eager where it cannot be captured, which the row then says) or eager.
    """

    implementation: str
    op: str
    dtype: str
    ranks: int
    size: int
    launch: LaunchMode

    def message(self) -> Message:
        """Its elements. WrongUsage: see :func:`opkit.collect.comm.sizes.message`."""
        return message(self.op, self.dtype, self.size, self.ranks)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.message().total * ITEM_BYTES[self.dtype]

    def label(self) -> str:
        """As a reader writes it: ``vllm all_reduce bfloat16, 2 ranks, 65,536 bytes, graph``."""
        return (
            f"{self.implementation} {self.op} {self.dtype}, {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''}, {self.size:,} bytes, {self.launch}"
        )


@dataclass(frozen=True)
class World:
    """Cases that the same processes measure."""

    implementation: str
    ranks: int
    cases: tuple[CommCase, ...]

    def label(self) -> str:
        """For messages: ``nccl, 4 ranks``."""
        return f"{self.implementation}, {self.ranks} rank{'s' if self.ranks > 1 else ''}"


def launches(case: CommCase) -> int:
    """Launches in one batch of a case."""
    return max(FEWEST_LAUNCHES, min(MOST_LAUNCHES, BATCH_BYTES // max(case.size, 1)))


def gpu_counts(options: CommOptions, present: int) -> tuple[int, ...]:
    """How many GPUs the worlds have.

    Raises:
        BadInput: more are asked for than there are.
        ToolMissing: there is none.
        WrongUsage: a number below 1.
    """
    wrong = [count for count in options.gpus if count < 1]
    if wrong:
        raise WrongUsage(f"--gpus must be at least 1, not {wrong[0]}")
    if options.device == "cuda" and not present:
        raise ToolMissing(
            "no GPU is here",
            "--gpus 2,4,8 --plan plans for another host; --device cpu tries everything but numbers",
        )
    if options.gpus:
        most = max(options.gpus)
        if options.device == "cuda" and most > present:
            raise BadInput(
                f"--gpus asks for {most} GPUs and {present} {'is' if present == 1 else 'are'} here",
                f"leave --gpus out to use the {present} present",
            )
        return tuple(sorted(set(options.gpus)))
    if options.device == "cpu":
        return (2,)
    counts = [1 << power for power in range(1, 31) if 1 << power <= present]
    return tuple(counts) or (1,)


def make_worlds(options: CommOptions, present: int) -> tuple[World, ...]:
    """All worlds with their cases: by op, dtype and ascending size.

    Args:
        present: GPUs of this host.

    Raises:
        WrongUsage: an unknown op or dtype, sizes that cannot be, nothing to measure.
        BadInput, ToolMissing: see :func:`gpu_counts`.
    """
    ops = _known("--ops", [ALIASES.get(op, op) for op in options.ops], OPS)
    dtypes = _known("--dtype", options.dtypes, DTYPES)
    custom = options.all_reduce_backend
    if custom and custom not in CUSTOM_BACKENDS:
        raise WrongUsage(f"--all-reduce-backend must be one of {', '.join(CUSTOM_BACKENDS)}")
    if custom and options.device == "cpu":
        raise WrongUsage(
            f"the all-reduce of {custom} needs GPUs, so --device cpu cannot go with it"
        )
    if not ops and not custom:
        ops = OPS
    counts = gpu_counts(options, present)
    made = []
    if ops and not dtypes:
        raise WrongUsage(f"--dtype names no type; known: {', '.join(DTYPES)}")
    if ops:
        sizes = _sizes(options, NCCL_SPAN)
        name, mode = ("gloo", LaunchMode.EAGER) if options.device == "cpu" else _NCCL
        made += [
            _world(name, count, ops, dtypes, sizes, (mode,)) for count in counts
        ]  # fmt: skip
    if custom:
        between = [count for count in counts if count > 1]
        if not between:
            raise BadInput(
                f"the all-reduce of {custom} needs at least two GPUs",
                "leave --all-reduce-backend out to measure NCCL on one",
            )
        modes = (LaunchMode.GRAPH, LaunchMode.EAGER) if custom == "vllm" else (LaunchMode.GRAPH,)
        sizes = _sizes(options, CUSTOM_SPAN)
        made += [
            _world(custom, count, ("all_reduce",), (CUSTOM_DTYPE,), sizes, modes)
            for count in between
        ]
    return tuple(made)


_NCCL = ("nccl", LaunchMode.GRAPH)


def _sizes(options: CommOptions, span: Span) -> tuple[int, ...]:
    first = span.first if options.min_bytes is None else options.min_bytes
    last = span.last if options.max_bytes is None else options.max_bytes
    return Span(first, last, options.factor).sizes()


def _world(
    implementation: str,
    ranks: int,
    ops: Iterable[str],
    dtypes: Iterable[str],
    sizes: tuple[int, ...],
    modes: tuple[LaunchMode, ...],
) -> World:
    cases = [
        CommCase(implementation, op, dtype, ranks, size, mode)
        for op in ops
        for dtype in dtypes
        for mode in modes
        for size in sizes
    ]
    for case in cases:
        case.message()  # a size that cannot be is told before anything runs
    return World(implementation, ranks, tuple(cases))


def _known(option: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    for value in given:
        if value not in known:
            raise WrongUsage(f"{option} knows no {value!r}, only {', '.join(known)}")
    return tuple(value for value in known if value in set(given))


def series_of(implementation: str, subject: Mapping[str, Any], timing: Timing) -> str:
    """The digest of all that the rows of one table share: 10 hexadecimal digits of a SHA-256.

    Args:
        subject: versions, GPU names and the variables that change what the library does.
    """
    return _digest({"implementation": implementation, "timing": asdict(timing), **subject})


def case_key(series: str, case: CommCase) -> str:
    """The digest of all that decides a row's value: ``SERIES-CASE``."""
    return f"{series}-{_digest(asdict(case))}"


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(digest_text(data).encode()).hexdigest()[:10]


def estimate_seconds(worlds: Iterable[World], timing: Timing) -> float:
    """Roughly how long it will take, from the guesses above; 40 batches a case assumed."""
    batches = min(max(40, timing.min_iterations), timing.max_iterations)
    return sum(
        WORLD_SECONDS + sum(_case_seconds(case, batches, timing) for case in world.cases)
        for world in worlds
    )


def _case_seconds(case: CommCase, batches: int, timing: Timing) -> float:
    crossing = case.total_bytes * bus_factor(case.op, case.ranks) / BUS_BYTES_PER_SECOND
    batch = BATCH_SECONDS + launches(case) * (START_SECONDS + crossing)
    least = batch * (timing.min_iterations + timing.warmups)
    return CASE_SECONDS + max(least, min(batch * (batches + timing.warmups), timing.max_seconds))
