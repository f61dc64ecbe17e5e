"""Models of one layer, as vLLM's runner wants a model, that launch the op and nothing else.

:class:`OneLayerModel` is what all share; :class:`InsideLayer` takes the op's modules out of the
engine's own model, cut to one layer, and feeds them what that model feeds them.

Source: vLLM 0.24.0, ``v1/worker/gpu_model_runner.py`` for how a model is called, and
``model_executor/models/`` for what the layers are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.model_loader.utils import get_model_cls

from opkit.errors import BadInput
from opkit.layers.backends.shared import draw, has_module, of_layer
from opkit.layers.captured import Captured, Rows, input_name


@dataclasses.dataclass(frozen=True)
class Step:
    """What the op was called with in one step, and the forward context around it."""

    context: ForwardContext
    arguments: dict[str, Any]


class OneLayerModel(torch.nn.Module):  # type: ignore[misc]  # torch is untyped where it is absent
    """A model whose forward makes the op's arguments, remembers them, and launches the op.

    A subclass says which modules are the op (:meth:`ops`) and makes their arguments
    (:meth:`arguments`), called ``PATH/ARGUMENT``. They lie at one address for every step, since
    graphs are captured over them.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        del prefix  # the engine's signature; layer names here are the engine's own, from "model."
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.launch: Callable[..., Any] = self.module_forward
        self.last: Step | None = None
        self.rows: Rows = ()  # of the step to come: whose tokens they are
        self.captured: Captured | None = None
        self.recipe = "tokens"  # see Plan.inputs
        self._pinned: dict[str, Any] = {}

    def ops(self) -> dict[str, Any]:
        """The modules that are the op, by their path below the layer, in the order of the calls."""
        raise NotImplementedError

    def arguments(self, input_ids: Any, positions: Any) -> dict[str, Any]:
        """The op's arguments in this step, made as the engine makes them, and pinned."""
        raise NotImplementedError

    def module_forward(self, **arguments: Any) -> Any:
        """One forward of the op, and nothing else; of several modules, the last one's output."""
        output = None
        for path, module in self.ops().items():
            own = {
                name.removeprefix(f"{path}/"): value
                for name, value in arguments.items()
                if name.startswith(f"{path}/")
            }
            output = module(**own)
        return output[0] if isinstance(output, tuple) else output

    def forward(self, input_ids: Any, positions: Any, **_: Any) -> Any:
        """One step, as the engine's runner calls a model; remembers it in ``last``."""
        arguments = self.arguments(input_ids, positions)
        if self.captured is not None and self.rows:
            self._replay(arguments)
        for number, value in enumerate(arguments.values()):
            draw(self.recipe, value, number)
        self.last = Step(get_forward_context(), arguments)
        return self.launch(**arguments)

    def compute_logits(self, hidden: Any) -> Any:
        """Nothing is sampled here; the runner insists on asking."""
        return hidden

    def pin(self, name: str, value: Any) -> Any:
        """``value``'s rows at the address that all steps share, with the strides that it came with.

        A tensor that is a slice of a fused product keeps its distance from row to row.
        """
        if name not in self._pinned:
            row = (value.stride(0),) if value.ndim == 2 else tuple(value.shape[1:])
            whole = torch.empty(
                (max(self.max_tokens, value.shape[0]), *row), dtype=value.dtype, device=value.device
            )
            self._pinned[name] = whole[:, : value.shape[1]] if value.ndim == 2 else whole
        target = self._pinned[name][: value.shape[0]]
        target.copy_(value)
        return target

    def _replay(self, arguments: Mapping[str, Any]) -> None:
        """Overwrite the arguments that the engine's run has stored, row by row."""
        assert self.captured is not None
        stored = [name for name in arguments if self.captured.has(name)]
        if not stored:
            raise BadInput(f"none of the op's inputs was captured: {', '.join(arguments)}")
        for name in stored:
            rows = self.captured.rows(name, self.rows)
            arguments[name][: rows.shape[0]].copy_(rows)


class InsideLayer(OneLayerModel):
    """The engine's own model of one layer; the op's modules are called again, alone.

    The model runs once a step, so that every module is given exactly what the engine gives it; what
    the op's modules were called with is kept, and only they are launched for the trace.

    Attributes:
        paths: the op's modules below the layer, in the order of their calls.
    """

    paths: tuple[str, ...] = ()
    engine_layer: int = 0  # whose weights a checkpoint gives

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.engine = get_model_cls(vllm_config.model_config)(vllm_config=vllm_config, prefix="")
        layer = self.engine.model.layers[0]
        missing = [path for path in self.paths if not has_module(layer, path)]
        if missing:
            raise BadInput(f"{type(layer).__name__} of vLLM has no {', '.join(missing)}")
        self._ops = {path: layer.get_submodule(path) for path in self.paths}
        self.layer_class = type(layer)

    def ops(self) -> dict[str, Any]:
        """See :class:`OneLayerModel`."""
        return self._ops

    def arguments(self, input_ids: Any, positions: Any) -> dict[str, Any]:
        """What the engine's own model calls the op's modules with, pinned as it is called."""
        found: dict[str, Any] = {}
        with watched(self._ops, lambda name, value: found.update({name: self._keep(name, value)})):
            self.engine(input_ids, positions)
        return found

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """The checkpoint's weights of one layer and of all that is outside the layers."""
        loaded: set[str] = self.engine.load_weights(of_layer(weights, self.engine_layer))
        return {f"engine.{name}" for name in loaded}

    def _keep(self, name: str, value: Any) -> Any:
        return self.pin(name, value) if isinstance(value, torch.Tensor) else value


def inside(config: VllmConfig, paths: Sequence[str], engine_layer: int = 0) -> type[InsideLayer]:
    """The class of a one-layer model around ``paths``.

    A class of its own for each model, because vLLM reads what it must know of quantisation off it.
    """
    engine = get_model_cls(config.model_config)
    taken = {
        name: getattr(engine, name)
        for name in ("packed_modules_mapping", "hf_to_vllm_mapper")
        if hasattr(engine, name)
    }
    fields = {"paths": tuple(paths), "engine_layer": engine_layer, **taken}
    return type("InsideLayer", (InsideLayer,), {"__module__": __name__, **fields})


@contextmanager
def watched(modules: Mapping[str, Any], tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Tell every argument of every call of the modules, as ``PATH/ARGUMENT``, before the call."""
    handles = []
    for path, module in modules.items():
        signature = inspect.signature(module.forward)

        def hook(_: Any, args: Any, kwargs: Any, path: str = path, s: Any = signature) -> None:
            for name, value in s.bind(*args, **kwargs).arguments.items():
                tell(input_name(path, name), value)

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
