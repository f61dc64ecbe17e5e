"""What an alignment found: plain data, made by ``judge``, read by ``reports`` and ``ledger``.

Times are integer nanoseconds of GPU execution unless a name says otherwise.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opkit.layers.op import Case, LaunchMode, Phase

# Regions of which the GPU time is kept one by one: enough to see drift and outliers by eye.
MAX_SAMPLES = 240


class Outcome(StrEnum):
    """Outcome of one check, and, as the worst of them, the verdict of a phase or an alignment."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


def worst(outcomes: list[Outcome]) -> Outcome:
    """Fail beats inconclusive beats pass; nothing compared at all is inconclusive."""
    if Outcome.FAIL in outcomes:
        return Outcome.FAIL
    if Outcome.INCONCLUSIVE in outcomes or not outcomes:
        return Outcome.INCONCLUSIVE
    return Outcome.PASS


class Level(StrEnum):
    """How well two kernel names agree, or on which side a kernel stands alone."""

    SAME = "same"  # equal demangled names
    VARIANT = "variant"  # same kernel, other tile or template numbers
    ROLE = "role"  # declared equivalent in the policy
    DTYPE = "dtype"  # same kernel, other element types: never good enough
    MOCK_ONLY = "mock only"
    E2E_ONLY = "e2e only"


class Method(StrEnum):
    """How the op's regions were found in the E2E trace, best first."""

    LAUNCH_NVTX = "module range of the launch"
    NODE_NVTX = "module range of the graph node's creation"
    SEQUENCE = "sequence"


@dataclass(frozen=True)
class KernelStat:
    """One kernel at one place of the op's sequence on one side, over all regions of a case.

    Attributes:
        name: demangled name.
        short: the name a reader recognises, without namespaces and template arguments.
        family: kernel family (``nvjet``, ``elementwise``, …).
        grid, block: launch dimensions (x, y, z); None when they differ between regions.
        calls: executions seen.
        median_ns, min_ns, max_ns: of the execution time.
        mad_ns: median absolute deviation of the execution time: its spread.
        offset_ns: median over regions of its start after the region's first start; None in a
            result of an older opkit.
    """

    name: str
    short: str
    family: str
    grid: tuple[int, int, int] | None
    block: tuple[int, int, int] | None
    calls: int
    median_ns: int
    min_ns: int
    max_ns: int
    mad_ns: int
    offset_ns: int | None = None


@dataclass(frozen=True)
class KernelPair:
    """One row of the kernel table, in launch order; one side is None when it stands alone.

    ``share`` is its part of the region's GPU time on the side where that part is larger (0 to 1).
    """

    mock: KernelStat | None
    e2e: KernelStat | None
    level: Level
    key: bool
    glue: bool
    share: float

    @property
    def ratio(self) -> float | None:
        """Mock's median time over E2E's; None when one side is missing."""
        if self.mock is None or self.e2e is None or self.e2e.median_ns == 0:
            return None
        return self.mock.median_ns / self.e2e.median_ns

    @property
    def name(self) -> str:
        """The short name: the engine's where it has one."""
        side = self.e2e or self.mock
        assert side is not None
        return side.short


@dataclass(frozen=True)
class SideSummary:
    """One side of one case.

    Attributes:
        case: the shape that ran.
        mode: eager or graph; None when regions disagree.
        regions: regions found.
        odd_regions: regions whose kernel sequence is not the most frequent one.
        misreported: regions of that sequence but for kernels that nsys calls copies (see
            ``regions``).
        launches: kernels, copies and fills of one region (of the most frequent sequence).
        gpu_ns: median over regions of the summed GPU time.
        elapsed_ns: median over regions of last end minus first start on the GPU timeline.
        unattributed: kernels of these steps that no launch or range explains.
        samples_ns: GPU time of single regions of the most frequent sequence, in the order in which
            they ran, rank after rank; at most ``MAX_SAMPLES``, spread evenly.
    """

    case: Case
    mode: LaunchMode | None
    regions: int
    odd_regions: int
    launches: int
    gpu_ns: int
    elapsed_ns: int
    unattributed: int = 0
    misreported: int = 0
    samples_ns: tuple[int, ...] = ()

    @property
    def mad_ns(self) -> float:
        """Median absolute deviation of the kept regions' GPU time; 0 where none are kept."""
        if not self.samples_ns:
            return 0.0
        middle = statistics.median(self.samples_ns)
        return statistics.median(abs(ns - middle) for ns in self.samples_ns)


@dataclass(frozen=True)
class KernelShare:
    """Kernels of one short name in the E2E steps that were read.

    Attributes:
        name: short name; of the last entry of a long list how many other names it stands for.
        launches: how often they ran.
        gpu_ns: summed execution time.
        share: its part of these steps' GPU time (0 to 1).
    """

    name: str
    launches: int
    gpu_ns: int
    share: float


@dataclass(frozen=True)
class KernelSum:
    """All launches of one kernel in a region: sums of median times, a launch count a side."""

    name: str
    mock_ns: int
    e2e_ns: int
    mock_launches: int
    e2e_launches: int
    glue: bool


@dataclass(frozen=True)
class CaseMatch:
    """One case: the mock's regions against the engine's.

    Attributes:
        attributed: share of the E2E steps' kernels that a launch and a range explain.
        explained: share of the E2E steps' GPU time that the op's regions explain.
        pairs: the kernels in launch order.
        steps: E2E steps that were read, over all ranks; 0 in a result of an older opkit.
        unattributed: kernels that ran during these steps and that no launch explains.
        outside: kernels of these steps outside the op's regions.
    """

    mock: SideSummary
    e2e: SideSummary
    method: Method
    attributed: float
    explained: float
    pairs: tuple[KernelPair, ...]
    steps: int = 0
    unattributed: tuple[KernelShare, ...] = ()
    outside: tuple[KernelShare, ...] = ()

    @property
    def by_kernel(self) -> tuple[KernelSum, ...]:
        """Time by the engine's short name (the mock's where the kernel stands alone), most first.

        Kernels that stand for each other share an entry.
        """
        sums: dict[str, KernelSum] = {}
        for pair in self.pairs:
            mock, e2e = pair.mock, pair.e2e
            old = sums.get(pair.name, KernelSum(pair.name, 0, 0, 0, 0, True))
            sums[pair.name] = KernelSum(
                pair.name,
                old.mock_ns + (mock.median_ns if mock else 0),
                old.e2e_ns + (e2e.median_ns if e2e else 0),
                old.mock_launches + (mock is not None),
                old.e2e_launches + (e2e is not None),
                old.glue and pair.glue,
            )
        return tuple(sorted(sums.values(), key=lambda s: -max(s.mock_ns, s.e2e_ns)))


@dataclass(frozen=True)
class CheckResult:
    """One rule over one phase.

    Attributes:
        check: evidence, names, counts, missing/extra, data, latency, launch, strict.
        outcome: pass, fail or inconclusive.
        detail: what was found, with kernels and numbers, in a sentence or a few.
        kernels: short names of the kernels that the outcome rests on.
        cause: the likely cause, when it did not pass.
        next_step: what to do, when it did not pass.
    """

    check: str
    outcome: Outcome
    detail: str
    kernels: tuple[str, ...] = ()
    cause: str = ""
    next_step: str = ""


@dataclass(frozen=True)
class PhaseResult:
    """All cases and checks of one phase."""

    phase: Phase
    verdict: Outcome
    method: Method | None
    attributed: float
    cases: tuple[CaseMatch, ...]
    checks: tuple[CheckResult, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlignResult:
    """The whole alignment of one op.

    ``provenance`` is JSON-ready: op, backend, gpu, versions, model, dtypes, tp_size, files (name,
    sha256,
    bytes), policy (all thresholds), commands, waves, created (UTC), opkit version, what nsys
    warned of.
    """

    op: str
    backend: str
    verdict: Outcome
    phases: tuple[PhaseResult, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
