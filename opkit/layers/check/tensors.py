"""What the check asks of tensors: their facts, their differences, and changing parts of a cache."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

from opkit.layers.check.facts import Difference, TensorFact
from opkit.layers.operands import dtype_name, sample

# An integer type of the same size: compares bits, fills any type with zeros, needs no contiguity.
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}

# Keys of an engine's dummy weights are about 1e-3, so is the query: zeros in their place change no
# score by a bit of a softmax's output. Keys of ±2^13 change them by several units.
_LOUD = 2.0**13


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor of torch."""
    return isinstance(value, importlib.import_module("torch").Tensor)


def bits(tensor: Any) -> Any:
    """The same storage as whole numbers."""
    torch = importlib.import_module("torch")
    if tensor.dtype is torch.bool:
        return tensor.view(torch.uint8)
    return tensor.view(getattr(torch, _BITS[tensor.element_size()]))


def same_bits(first: Any, second: Any) -> bool:
    """Whether two tensors are equal bit for bit: nan is equal to itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool((bits(first) == bits(second)).all())


def fact(name: str, tensor: Any, changed: bool = False) -> TensorFact:
    """Describe one tensor."""
    torch = importlib.import_module("torch")
    shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
    packed = not shape or shape[-1] == 1 or tensor.stride(-1) == 1
    if not tensor.is_floating_point():
        return TensorFact(name, shape, dtype, floating=False, packed=packed, changed=changed)
    # Finite or zero is asked of rows at a time: a float32 copy of a large one need not fit.
    rows = tensor.detach().reshape(shape[0], -1) if shape else tensor.detach().reshape(1, 1)
    bad = zero_rows = 0
    for part in rows.split(4096):
        values = part.float()
        bad += int((~torch.isfinite(values)).sum())
        zero_rows += int((values == 0).all(dim=1).sum())
    return TensorFact(
        name,
        shape,
        dtype,
        packed=packed,
        bad=bad,
        zeros=zero_rows == rows.shape[0],
        zero_rows=zero_rows,
        sample=sample(name, tensor) if tensor.numel() and shape else None,
        changed=changed,
    )


def difference(first: Any, second: Any) -> Difference | None:
    """Compare two tensors; None when they are not of one shape."""
    if first.shape != second.shape:
        return None
    equal = same_bits(first, second)
    one, other = (tensor.detach().reshape(-1).double() for tensor in (first, second))
    if not one.numel():
        return Difference(equal, 0.0, 0.0, 1.0)
    largest = (one - other).abs().max().item()
    scale = one.abs().max().item()
    relative = largest / scale if scale else (math.inf if largest else 0.0)
    lengths = one.norm().item() * other.norm().item()
    cosine = one.dot(other).item() / lengths if lengths else float(not largest)
    return Difference(equal, largest, relative, cosine)


class Blocks:
    """Some blocks of a cache: kept, blanked or stirred, looked at, and put back.

    Args:
        cache: the cache's storage; blocks along its first dimension.
        numbers: the blocks.
    """

    def __init__(self, cache: Any, numbers: Sequence[int]) -> None:
        torch = importlib.import_module("torch")
        self._type = cache.dtype
        self._cache = bits(cache)
        self._numbers = torch.tensor(list(numbers), dtype=torch.int64, device=cache.device)
        self._kept = self._cache[self._numbers]

    def blank(self) -> None:
        """Fill them with zeros."""
        self._cache[self._numbers] = 0

    def stir(self) -> bool:
        """Fill them with large finite values of either sign; False where the type holds no floats.

        Packed storage (bytes that hold values beside their scales) is left alone: any bits there
        may be a nan, and kernels that pick tokens by score need not end well with one.
        """
        torch = importlib.import_module("torch")
        if not self._type.is_floating_point:
            return False
        largest = torch.finfo(self._type).max
        level = min(_LOUD, 2.0 ** math.floor(math.log2(largest)))
        stream = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, tuple(self._kept.shape), generator=stream) * 2 - 1
        values = (signs.float() * level).to(self._type)
        self._cache[self._numbers] = bits(values).to(self._cache.device)
        return True

    def filled(self) -> int:
        """How many of them hold anything but zeros now."""
        now = self._cache[self._numbers].reshape(len(self._numbers), -1)
        return int((now != 0).any(dim=1).sum())

    def restore(self) -> None:
        """Put back what they held."""
        self._cache[self._numbers] = self._kept
