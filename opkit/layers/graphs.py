"""CUDA graphs of a forward whose engine brings none of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from opkit.errors import OpkitError
from opkit.layers.op import LaunchMode


class CaptureFailed(OpkitError):
    """A forward could not be captured into a CUDA graph; what it had taken is freed again."""


class CapturedGraph:
    """A forward captured once; calling it replays the graph and returns the graph's own output.

    Args:
        forward: what to capture; it is run once before, so that lazy set-up stays outside.
        repeat: forwards in the graph.

    Raises:
        CaptureFailed: CUDA refuses to capture the forward.
    """

    def __init__(self, forward: Callable[[], Any], repeat: int = 1) -> None:
        torch = importlib.import_module("torch")
        forward()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                for _ in range(repeat):
                    self._output = forward()
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.free()
            raise CaptureFailed(f"the forward cannot be captured: {reason}") from error

    def __call__(self) -> Any:
        self._graph.replay()
        return self._output

    def free(self) -> None:
        """Give the graph's memory pool back."""
        torch = importlib.import_module("torch")
        self._graph = self._output = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Launcher:
    """Launches forwards as cases ask: call by call, or from a graph, one graph at a time."""

    def __init__(self) -> None:
        self._graph: CapturedGraph | None = None

    def launch(self, forward: Callable[[], Any], mode: LaunchMode) -> Callable[[], Any]:
        """``forward`` itself, or the replay of its graph.

        Raises:
            CaptureFailed: CUDA refuses to capture the forward.
        """
        self.free()
        if mode is LaunchMode.EAGER:
            return forward
        self._graph = CapturedGraph(forward)
        return self._graph

    def free(self) -> None:
        """Give the last graph's memory back."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.free()
