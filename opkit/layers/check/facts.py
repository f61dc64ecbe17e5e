"""What was seen of a mock, as plain numbers: ``observe`` makes them, ``judge`` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field

from opkit.layers.check.cases import Asked, Role
from opkit.layers.manifest import Operand

LEAST_CHANGE = 1e-3  # of the output when its past is changed; more than a repetition's noise


@dataclass(frozen=True)
class Difference:
    """Two tensors compared.

    Attributes:
        equal: bit for bit.
        largest: the largest absolute difference; nan where either has one.
        relative: that over the largest magnitude of the first; infinite when the first is zero.
        cosine: of the two as vectors; 1.0 when both are zero.
    """

    equal: bool
    largest: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class TensorFact:
    """One tensor, an input or the output.

    Attributes:
        name: the argument's name, or ``output``.
        shape, dtype: as torch writes them, without ``torch.``.
        floating: whether its elements are floating-point numbers.
        packed: whether the elements of a row lie side by side in memory.
        bad: elements that are nan or infinite.
        zeros: whether every element is zero.
        zero_rows: rows (along the first dimension) of nothing but zeros.
        sample: its values' variety; None for whole numbers.
        changed: whether a forward has changed it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    floating: bool = True
    packed: bool = True
    bad: int = 0
    zeros: bool = False
    zero_rows: int = 0
    sample: Operand | None = None
    changed: bool = False


@dataclass(frozen=True)
class CacheFact:
    """One cache of one case.

    Attributes:
        name, shape, dtype: of the cache.
        new: blocks that hold entries of the step's new tokens; ``outside`` of them, and of the past
            ones, that the cache does not have.
        written: of these, those that a forward has filled after they were blanked.
        past: blocks of cached tokens only.
        read: the output with these changed (blanked, or stirred where that shows nothing), against
            the output before; None without any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    new: int
    outside: int
    written: int
    past: int
    read: Difference | None = None


@dataclass(frozen=True)
class Observation:
    """One case as it was seen.

    Attributes:
        asked: the case.
        refused: why the mock does not run this case here, in its own words; empty when it ran.
        uncaptured: why its forward cannot be captured into a CUDA graph.
        broke: the exception that a forward or the look at it ended with.
        fix: what the mock's error says to do.
        inputs, output: None when the forward returns nothing.
        shape, dtype: what the mock says its output is.
        repeated: two forwards in a row.
        caches: empty for an op without.
    """

    asked: Asked
    refused: str = ""
    uncaptured: str = ""
    broke: str = ""
    fix: str = ""
    inputs: tuple[TensorFact, ...] = ()
    output: TensorFact | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    repeated: Difference | None = None
    caches: tuple[CacheFact, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether there is anything to judge."""
        return not (self.refused or self.uncaptured or self.broke)

    def label(self) -> str:
        """The case, for a report."""
        return self.asked.label()


@dataclass(frozen=True)
class Pair:
    """The same tokens' outputs in two cases.

    Attributes:
        first, second: the roles of the cases.
        inputs: names of inputs that differ between them by more than rounding, although the tokens
            are the same.
        outputs: None when the outputs are not of one shape.
    """

    first: Role
    second: Role
    inputs: tuple[str, ...]
    outputs: Difference | None


@dataclass
class Seen:
    """All that was seen of a mock so far.

    Attributes:
        op, backend: the mock.
        device: ``cuda`` or ``cpu``.
        inputs: how its inputs were made.
        keeps_cache: whether the op has a KV cache.
        activations: element types that the mock says its activations have.
        cache_dtypes: element types of its caches.
        asked: every case that is to be run.
        observations, pairs, operands: what was found.
        operands_broke: why the operands could not be sampled.
    """

    op: str
    backend: str
    device: str
    inputs: str
    keeps_cache: bool
    activations: tuple[str, ...]
    cache_dtypes: tuple[str, ...]
    asked: tuple[Asked, ...]
    observations: list[Observation] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    operands: tuple[Operand, ...] | None = None
    operands_broke: str = ""

    def of(self, *roles: Role) -> list[Observation]:
        """The observations of these roles."""
        return [seen for seen in self.observations if seen.asked.role in roles]
