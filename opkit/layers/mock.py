"""What ``drive`` needs of a mock, whatever its op and backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from opkit.layers.manifest import Manifest, Operand
from opkit.layers.plan import PlannedCase

Forward = Callable[[], None]


class Mock(Protocol):
    """One op's layer, run alone by the engine's own classes."""

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """Make inputs, caches and metadata of a case ready.

        Returns:
            A function that launches exactly one forward of the op's module. It may be called any
            number of times until the next ``prepare``.

        Raises:
            BadInput: the server's own flags do not allow this case or this launch mode.
        """

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """Sample the operands of the module's large kernels in an extra forward of a case."""

    def describe(self) -> Manifest:
        """All that the mock knows of its side; ``drive`` adds operands and pacing."""

    def close(self) -> None:
        """Give back what the process holds."""
