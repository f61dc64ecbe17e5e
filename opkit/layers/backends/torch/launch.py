"""Graphs, versions and refusals, for mocks with a model and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from opkit.errors import BadInput
from opkit.layers.graphs import CapturedGraph
from opkit.layers.mock import Forward
from opkit.layers.plan import Plan


def captured(forward: Callable[[], Any]) -> tuple[CapturedGraph, Forward]:
    """Capture ``forward``; the graph, and a replay that returns the graph's own output.

    Raises:
        CaptureFailed: CUDA refuses.
    """
    outputs: list[Any] = []

    def kept() -> None:
        outputs[:] = [forward()]

    graph = CapturedGraph(kept)

    def replay() -> Any:
        graph()
        return outputs[0]

    return graph, replay


def versions(device: torch.device) -> dict[str, str]:
    """Versions of torch and CUDA, and the GPU's name."""
    found = {"torch": torch.__version__}
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "gpu": torch.cuda.get_device_name()}
    return found


def refuse_engines(plan: Plan) -> None:
    """Raise BadInput for what only a serving engine has."""
    if plan.inputs == "captured":
        raise BadInput(
            "the torch backend has no engine whose inputs could be captured",
            "give --inputs tokens or normal",
        )
    if plan.strict:
        raise BadInput("the torch backend has no engine whose decoder layer could be taken")
    if plan.engine_args:
        raise BadInput(
            f"the torch backend has no server that would read {' '.join(plan.engine_args)}",
            "give no engine flags with --backend torch",
        )


def dtype_name(dtype: Any) -> str:
    """As torch writes it, without the ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")
