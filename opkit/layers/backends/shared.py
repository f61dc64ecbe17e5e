"""What the mocks of several engines do alike with modules, weights and tensors."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opkit.layers.plan import Plan

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# What a folder with a checkpoint holds. Source: vLLM 0.24.0 and SGLang 0.5.14, ``_prepare_weights``
# of ``DefaultModelLoader``, what ``--load-format auto`` looks for.
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def loads_checkpoint(plan: Plan, load_format: str) -> bool:
    """Whether the mock's weights are the checkpoint that a server of these flags loads.

    A rank's share of a checkpoint is not cut out: with several ranks the mock draws its weights, as
    it does for a folder that holds none.
    """
    return load_format != "dummy" and plan.tp_size == 1 and _holds_weights(plan.model)


def drawn_weights(plan: Plan, load_format: str) -> str:
    """Why the mock draws its weights though these flags load them; empty where it does not."""
    if load_format == "dummy" or loads_checkpoint(plan, load_format):
        return ""
    if not _holds_weights(plan.model):
        return f"the mock draws its weights: the model's folder has no {', '.join(_WEIGHTS)}"
    return (
        f"the mock draws its weights: no rank's share is cut out of the checkpoint, which a server "
        f"of these flags loads (load format {load_format})"
    )


def _holds_weights(model: str) -> bool:
    return bool(model) and any(any(Path(model).glob(kind)) for kind in _WEIGHTS)


def draw(recipe: str, value: Any, seed: int) -> None:
    """Overwrite a floating-point argument by a recipe of :data:`opkit.layers.plan.INPUTS`.

    normal: N(0, 1), by a generator of its own. zeros: zeros. rows: every row equal to the first.
    tokens and captured, and what is no tensor of floating-point numbers, stay as they are.
    """
    if recipe in ("tokens", "captured"):
        return
    torch = importlib.import_module("torch")  # here: flags are read without it
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return
    if recipe == "normal":
        stream = torch.Generator(value.device).manual_seed(seed)
        value.copy_(
            torch.randn(value.shape, generator=stream, device=value.device, dtype=value.dtype)
        )
    elif recipe == "zeros":
        value.zero_()
    else:
        value.copy_(value[:1].expand_as(value).clone())


def of_layer(weights: Iterable[tuple[str, Any]], layer: int) -> Iterator[tuple[str, Any]]:
    """A checkpoint's weights of ``layer``, renamed to layer 0, and those outside the layers."""
    for name, tensor in weights:
        found = _LAYER.match(name)
        if found is None:
            yield name, tensor
        elif int(found[1]) == layer:
            yield _LAYER.sub("model.layers.0.", name), tensor


def has_module(layer: Any, path: str) -> bool:
    """Whether ``layer`` has a submodule at ``path``."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
