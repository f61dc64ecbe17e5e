"""The vocabulary of an op: phase, case, launch mode, and the NVTX ranges that a mock runs in.

The range text is the contract between the mock process (``drive``) and ``align``: it carries the
case, so a mock's trace explains itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opkit.layers.manifest import Manifest


class Phase(StrEnum):
    """Which half of serving: prompt processing or one-token decoding."""

    CONTEXT = "context"
    GENERATION = "generation"


class LaunchMode(StrEnum):
    """How the kernels reach the GPU: one call each, or replayed from a CUDA graph."""

    EAGER = "eager"
    GRAPH = "graph"


@dataclass(frozen=True, order=True)
class Case:
    """One shape of one phase; every request of the batch has the same lengths.

    Attributes:
        phase: context or generation.
        batch: requests in the step.
        tokens: new tokens per request (1 in generation).
        past: tokens per request already in the KV cache before the step; -1 when unknown.
    """

    phase: Phase
    batch: int
    tokens: int
    past: int

    def label(self) -> str:
        """The case as a reader writes it: ``4 × 1,024`` or ``16 × 1 @ 1,029``."""
        cached = f" @ {self.past:,}" if self.past > 0 else " @ ?" if self.past < 0 else ""
        return f"{self.batch} × {self.tokens:,}{cached}"


@dataclass(frozen=True, order=True)
class GemmCase:
    """One matrix product: activations [m, k] by the transpose of weights [n, k].

    Attributes:
        m: rows of the activations: tokens of the step.
        n: output features.
        k: input features.
        dtype: element type of both operands, as torch writes it.
    """

    m: int
    n: int
    k: int
    dtype: str = "bfloat16"

    def label(self) -> str:
        """The case as a reader writes it: ``4,096 × 16,384 × 7,168 bfloat16``."""
        return f"{self.m:,} × {self.n:,} × {self.k:,} {self.dtype}"


@dataclass(frozen=True, order=True)
class MoeCase:
    """One step of a mixture of experts, whose tokens are sent to experts by a stated rule.

    Attributes:
        tokens: tokens of the step.
        routing: how they are spread over the experts: ``balanced``, or ``power_law_A`` with the
            exponent A of the experts' popularity.
    """

    tokens: int
    routing: str = "balanced"

    def label(self) -> str:
        """The case as a reader writes it: ``4,096 power_law_1.2``."""
        return f"{self.tokens:,} {self.routing}"


AnyCase = Case | GemmCase | MoeCase


def case_from_json(item: Mapping[str, Any]) -> AnyCase:
    """One case from its JSON object; KeyError, TypeError or ValueError when it is none."""
    if "m" in item:
        return GemmCase(item["m"], item["n"], item["k"], item["dtype"])
    if "routing" in item:
        return MoeCase(item["tokens"], item["routing"])
    return Case(Phase(item["phase"]), item["batch"], item["tokens"], item["past"])


@dataclass(frozen=True)
class MockRange:
    """One iteration of one case of a mock, as written into and read back from an NVTX range."""

    op: str
    case: AnyCase
    mode: LaunchMode
    iteration: int
    variant: str = "mock"  # "mock", or "strict": the module of the engine's own decoder layer

    def text(self) -> str:
        """The NVTX range's text; :func:`parse_mock_range` reads it back."""
        return (
            f"opkit {self.op} {_case_text(self.case)} "
            f"mode={self.mode} variant={self.variant} iter={self.iteration}"
        )


def _case_text(case: AnyCase) -> str:
    if isinstance(case, GemmCase):
        return f"product m={case.m} n={case.n} k={case.k} dtype={case.dtype}"
    if isinstance(case, MoeCase):
        return f"experts t={case.tokens} routing={case.routing}"
    return f"{case.phase} b={case.batch} t={case.tokens} past={case.past}"


_MOCK_RANGE = re.compile(
    r"opkit (?P<op>\S+) (?:"
    r"(?P<phase>context|generation) b=(?P<batch>\d+) t=(?P<tokens>\d+) past=(?P<past>\d+)"
    r"|product m=(?P<m>\d+) n=(?P<n>\d+) k=(?P<k>\d+) dtype=(?P<dtype>\S+)"
    r"|experts t=(?P<all>\d+) routing=(?P<routing>\S+)"
    r") mode=(?P<mode>eager|graph) variant=(?P<variant>\S+) iter=(?P<iter>\d+)"
)
MOCK_RANGE_PREFIX = "opkit "


def parse_mock_range(text: str) -> MockRange | None:
    """The range that ``text`` names, or None when it is not one of a mock's iteration ranges."""
    found = _MOCK_RANGE.fullmatch(text)
    if found is None:
        return None
    case: AnyCase
    if found["phase"]:
        sizes = (int(found[name]) for name in ("batch", "tokens", "past"))
        case = Case(Phase(found["phase"]), *sizes)
    elif found["dtype"]:
        case = GemmCase(int(found["m"]), int(found["n"]), int(found["k"]), found["dtype"])
    else:
        case = MoeCase(int(found["all"]), found["routing"])
    return MockRange(
        found["op"], case, LaunchMode(found["mode"]), int(found["iter"]), found["variant"]
    )


@dataclass(frozen=True)
class RegionPattern:
    """How an op's region is found in a serving engine's trace.

    Attributes:
        module: regular expression, searched in a module path; its group ``layer`` is the layer's
            number.
        borders: regular expressions over kernel names that stand directly before or after the op in
            a layer (norm kernels, usually). They delimit a region found by sequence when no module
            range of the same trace has shown the real neighbours.
    """

    module: str
    borders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A perf table of the field: what one phase of an op is written as.

    Attributes:
        name: the value of its column ``op_name``; the files are called ``NAME_perf``.
        family: folder below a system's data, as aiconfigurator lays them out.
        columns: its own columns in order, after the five common ones and before ``latency``.
        kernel_source: value of that column for each backend; for some ops it selects a bucket.
    """

    name: str
    family: str
    columns: tuple[str, ...]
    kernel_source: Mapping[str, str]


# The table's own columns of one case, from the case and what the mock says of itself.
Columns = Callable[[Any, Manifest], dict[str, str | int]]
# Floating-point operations and least bytes moved of one forward, for a bound on its time.
Work = Callable[[Any, Manifest], tuple[float, float]]


@dataclass(frozen=True)
class Op:
    """One measurable op.

    Attributes:
        name: the word users type.
        title: what it is, in one line.
        phases: the phases in which its layer runs, and is aligned.
        region: region pattern for each backend.
        data_dependent: regular expressions of kernel names whose time depends on operand values.
        tables: the perf table of each phase; under ``""`` for an op whose rows know no phase. Its
            keys are what is collected: the sweep has a grid for each (``""``: by the op's name).
        columns: see :data:`Columns`.
        work: see :data:`Work`.
        shares: keys of ``config.json`` of which a tensor-parallel rank has its share; the mock's
            model is given the local value (see :func:`opkit.layers.geometry.local_overrides`).
        routed: whether a step's time depends on where its tokens are sent: then equal shapes are
            compared in the same step only, and collected rows state their routing.
    """

    name: str
    title: str
    phases: tuple[Phase, ...]
    region: dict[str, RegionPattern]
    data_dependent: tuple[str, ...] = field(default=())
    tables: Mapping[str, Table] = field(default_factory=dict)
    columns: Columns | None = None
    work: Work | None = None
    shares: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")
    routed: bool = False

    def table(self, case: AnyCase) -> Table:
        """The table that ``case`` belongs to; KeyError when the op has none for it."""
        return self.tables[case.phase if isinstance(case, Case) else ""]
