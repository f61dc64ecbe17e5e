"""The op in the engine's own decoder layer: what it is called with, and calling it again, alone.

The engine's model of one layer runs a step; on the way each call of the op is kept with its
arguments, so that they are what the engine makes them in this version, whatever their names. Then
only those calls are repeated.

Source: NVIDIA/TensorRT-LLM, ``_torch/modules/attention.py`` at 00547a2 and
``_torch/attention/attention.py`` at 930bd1a (``Attention.forward_impl``, where rope fused into the
attention, cache write and attention begin); ``tools/layer_wise_benchmarks/runner.py`` at 020cbd8,
which replaces methods of modules the same way.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opkit.layers.backends.trtllm.probe import Upstream
from opkit.layers.captured import Captured, Rows, input_name
from opkit.layers.gemm import LINEARS


@dataclass(frozen=True)
class Seam:
    """Where an op begins: a method of a module below a decoder layer.

    Attributes:
        path: of the module, below the layer.
        method: ``forward``, or one that ``forward`` calls.
    """

    path: str
    method: str = "forward"

    @property
    def name(self) -> str:
        """How its inputs are called: by the path, and the method where it is not ``forward``."""
        return self.path if self.method == "forward" else f"{self.path}.{self.method}"


def seams_of(op: str, architecture: str) -> tuple[Seam, ...]:
    """Where an op begins in a layer of a model, in the order of the calls."""
    if op == "gqa":
        return (Seam("self_attn", "forward_impl"),)
    if op == "moe":
        block = "block_sparse_moe" if architecture == "MixtralForCausalLM" else "mlp"
        return (Seam(f"{block}.experts"),)
    if op == "gemm":
        return tuple(Seam(path) for path in LINEARS)
    return (Seam("self_attn"),)


@dataclass
class Call:
    """One call of an op, to be repeated.

    Attributes:
        seam: of the op.
        target: the module, so that its hooks run, or the method.
        bound: its arguments.
    """

    seam: Seam
    target: Callable[..., Any]
    bound: inspect.BoundArguments

    def again(self) -> Any:
        """Make the call; of several outputs the first."""
        output = self.target(*self.bound.args, **self.bound.kwargs)
        return output[0] if isinstance(output, tuple | list) else output

    def tensors(self) -> dict[str, Any]:
        """Its arguments that are tensors, as ``PATH/ARGUMENT``."""
        torch = importlib.import_module("torch")
        return {
            input_name(self.seam.name, name): value
            for name, value in self.bound.arguments.items()
            if isinstance(value, torch.Tensor)
        }

    def replace(self, argument: str, value: Any) -> None:
        """Give another value to an argument."""
        self.bound.arguments[argument] = value


def module_of(upstream: Upstream, layer: Any, seam: Seam) -> Any:
    """The module of a seam.

    Raises:
        ToolMissing: this version's layer has no such module or method.
    """
    module = layer
    for part in seam.path.split("."):
        module = getattr(module, part, None)
        if module is None:
            raise upstream.drift(f"{type(layer).__name__} has no {seam.path}")
    if not callable(getattr(module, seam.method, None)):
        raise upstream.drift(f"{type(module).__name__} ({seam.path}) has no {seam.method}")
    return module


@contextmanager
def recording(
    upstream: Upstream, layer: Any, seams: Sequence[Seam], keep: Callable[[Call], None]
) -> Iterator[None]:
    """Tell every call of the seams of a layer, before it is made."""
    changed: list[tuple[Any, str, Any]] = []
    try:
        for seam in seams:
            module = module_of(upstream, layer, seam)
            original = getattr(module, seam.method)
            changed.append((module, seam.method, vars(module).get(seam.method)))
            setattr(module, seam.method, _recorder(seam, module, original, keep))
        yield
    finally:
        for module, method, own in changed:
            if own is None:
                delattr(module, method)  # the class's own is seen again
            else:
                setattr(module, method, own)


def _recorder(
    seam: Seam, module: Any, original: Callable[..., Any], keep: Callable[[Call], None]
) -> Callable[..., Any]:
    target = module if seam.method == "forward" else original
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        keep(Call(seam, target, signature.bind(*args, **kwargs)))
        return original(*args, **kwargs)

    return call


def redraw(calls: Sequence[Call], recipe: str, seed: int) -> None:
    """Overwrite the calls' two-dimensional floating-point inputs by a recipe of ``Plan.inputs``.

    ``tokens`` leaves them as the engine made them; ``captured`` is :func:`replay`'s.
    """
    if recipe in ("tokens", "captured"):
        return
    torch = importlib.import_module("torch")
    for number, value in enumerate(_inputs(calls).values()):
        if recipe == "normal":
            stream = torch.Generator(value.device).manual_seed(seed + number)
            drawn = torch.randn(value.shape, generator=stream, device=value.device)
            value.copy_(drawn.to(value.dtype))
        elif recipe == "zeros":
            value.zero_()
        else:  # rows
            value.copy_(value[:1].clone().expand_as(value))


def replay(calls: Sequence[Call], captured: Captured, rows: Rows) -> tuple[str, ...]:
    """Overwrite the inputs that the engine's run has stored; return the names of those."""
    found = []
    for name, value in _inputs(calls).items():
        if captured.has(name):
            stored = captured.rows(name, rows)
            value[: stored.shape[0]].copy_(stored)
            found.append(name)
    return tuple(found)


def _inputs(calls: Sequence[Call]) -> dict[str, Any]:
    return {
        name: value
        for call in calls
        for name, value in call.tensors().items()
        if value.ndim == 2 and value.is_floating_point()
    }
