"""Versions and refusals, for mocks with a model and without."""

from __future__ import annotations

import torch

from opkit.errors import BadInput
from opkit.layers.plan import Plan


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
