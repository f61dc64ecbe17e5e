"""What the mocks of several engines do alike with modules, weights and tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def draw(recipe: str, value: Any, seed: int) -> None:
    """Overwrite a floating-point argument by a recipe of :data:`opkit.layers.plan.INPUTS`.

    normal: N(0, 1), by a generator of its own. zeros: zeros. rows: every row equal to the first.
    tokens and captured, and what is no tensor of floating-point numbers, stay as they are.
    """
    if recipe in ("tokens", "captured"):
        return
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
