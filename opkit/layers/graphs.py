"""CUDA graphs of a forward whose engine brings none of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from opkit.errors import OpkitError


class CaptureFailed(OpkitError):
    """A forward could not be captured into a CUDA graph; what it had taken is freed again."""


class CapturedGraph:
    """A forward captured once; calling it replays the graph.

    Args:
        forward: what to capture; it is run once before, so that lazy set-up stays outside.
        repeat: forwards in the graph.

    Raises:
        CaptureFailed: CUDA refuses to capture the forward.
    """

    def __init__(self, forward: Callable[[], None], repeat: int = 1) -> None:
        torch = importlib.import_module("torch")
        forward()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                for _ in range(repeat):
                    forward()
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.free()
            raise CaptureFailed(f"the forward cannot be captured: {reason}") from error

    def __call__(self) -> None:
        self._graph.replay()

    def free(self) -> None:
        """Give the graph's memory pool back."""
        torch = importlib.import_module("torch")
        self._graph = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
