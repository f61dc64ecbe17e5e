"""What ``drive``, ``collect`` and ``check`` need of a mock, whatever its op and backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from opkit.layers.manifest import Manifest, Operand
from opkit.layers.plan import PlannedCase

# Launches one forward of the op's module; returns its output (a tensor), or None when it has none
# to show. After a graph's replay that is the graph's own output buffer.
Forward = Callable[[], Any]


@dataclass(frozen=True)
class CacheView:
    """One cache of a prepared case as :mod:`opkit.layers.check` looks at it.

    Attributes:
        name: what it is called, as ``kv_cache`` or ``indexer_cache``.
        tensor: its storage; the first dimension counts blocks (or slots), whatever follows.
        new: numbers along that dimension that hold entries of the step's new tokens.
        past: numbers whose entries all belong to tokens cached before the step; may be empty.
    """

    name: str
    tensor: Any
    new: tuple[int, ...]
    past: tuple[int, ...] = ()


@dataclass(frozen=True)
class Probe:
    """What a prepared case is given and must return, for the checklist.

    Attributes:
        inputs: the tensors that the module is called with, by argument name; what the forward reads
            is these very tensors.
        shape: the output's dimensions.
        dtype: the output's element type, as torch writes it without ``torch.``.
        caches: empty for an op without caches.
    """

    inputs: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: str
    caches: tuple[CacheView, ...] = field(default=())


class Mock(Protocol):
    """One op's layer, run alone by the engine's own classes."""

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """Make inputs, caches and metadata of a case ready.

        Returns:
            A function that launches exactly one forward of the op's module. It may be called any
            number of times until the next ``prepare``, each time with the same input.

        Raises:
            BadInput: the server's own flags do not allow this case or this launch mode.
        """

    def probe(self) -> Probe:
        """Inputs, expected output and caches of the case prepared last."""

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """Sample the operands of the module's large kernels in an extra forward of a case."""

    def describe(self) -> Manifest:
        """All that the mock knows of its side; ``drive`` adds operands and pacing."""

    def close(self) -> None:
        """Give back what the process holds."""
