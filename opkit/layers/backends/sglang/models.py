"""The engine's own model of one layer, which launches the op's modules alone.

The model runs once a step, so that every module of the op is given exactly what the engine gives
it; what the modules were called with is kept at an address of its own, and only they are launched
for the trace.

Source: SGLang 0.5.14, ``model_executor/runner`` for how a model is called, ``models/`` for what the
layers are, ``layers/communicator.py`` for what a layer leaves for its attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from sglang.srt.layers.communicator import AttentionInputs, get_attn_tp_context
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.runner import get_is_capture_mode
from sglang.srt.utils import BumpAllocator
from torch.utils import _pytree as tree

from opkit.errors import BadInput
from opkit.layers.backends.shared import draw, has_module, of_layer
from opkit.layers.captured import input_name


@dataclass(frozen=True)
class Call:
    """One call of one of the op's modules, as the engine makes it; its tensors are the mock's.

    Attributes:
        path: the module's, below its layer.
        names: of the positional arguments.
        args, kwargs: what it is called with.
    """

    path: str
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> dict[str, Any]:
        """Tensor arguments by ``PATH/ARGUMENT``."""
        named = {**dict(zip(self.names, self.args, strict=True)), **self.kwargs}
        return {
            input_name(self.path, name): value
            for name, value in named.items()
            if isinstance(value, torch.Tensor)
        }


@dataclass(frozen=True)
class Step:
    """The op's calls of one step, and the engine's description of the step."""

    calls: tuple[Call, ...]
    batch: Any


class OneLayer:
    """Put before an engine's model class: only the op's modules are launched for the trace.

    Attributes:
        paths: the op's modules below a decoder layer.
        engine_layer: whose weights a checkpoint gives.
        last: the step that ran last, eagerly or as a graph's capture.
        captured: the steps that graphs were captured over, by their (padded) number of tokens.
        recipe: how floating-point arguments are made, see ``Plan.inputs``.
    """

    paths: ClassVar[tuple[str, ...]] = ()
    engine_layer: ClassVar[int] = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layer = self.layer
        missing = [path for path in self.paths if not has_module(layer, path)]
        if missing:
            raise BadInput(f"{type(layer).__name__} of SGLang has no {', '.join(missing)}")
        self.last: Step | None = None
        self.captured: dict[int, Step] = {}
        self.recipe = "tokens"
        for module in self.ops().values():
            experts = getattr(module, "moe_runner_config", None)
            if experts is not None:
                # Experts write their output over their input: the next forward would run on it.
                experts.inplace = False

    @property
    def layer(self) -> Any:
        """The decoder layer that holds the op's modules."""
        return self.model.layers[0]  # type: ignore[attr-defined]  # of the engine's class

    def ops(self) -> dict[str, Any]:
        """The op's modules by their path below the layer."""
        return {path: self.layer.get_submodule(path) for path in self.paths}

    def load_weights(self, weights: Iterable[tuple[str, Any]], *args: Any, **kwargs: Any) -> Any:
        """The checkpoint's weights of one layer and of all that is outside the layers."""
        found = of_layer(weights, self.engine_layer)
        return super().load_weights(found, *args, **kwargs)  # type: ignore[misc]

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, **_: Any) -> Any:
        """One step, as the engine's runners call a model; remembers it in ``last``.

        While a graph is captured, the op's modules are launched and nothing else, over what the
        runner's warm-up just before has left.
        """
        tokens = input_ids.shape[0]
        if get_is_capture_mode() and torch.cuda.is_current_stream_capturing():
            step = self.captured[tokens]
        else:
            step = Step(self.record(input_ids, positions, forward_batch), forward_batch)
            if get_is_capture_mode():
                if tokens in self.captured:
                    overwrite(self.captured[tokens].calls, step.calls)
                else:
                    self.captured[tokens] = step
                step = self.captured[tokens]
        self.last = step
        output = self.launch(step)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=output)

    def record(self, input_ids: Any, positions: Any, forward_batch: Any) -> tuple[Call, ...]:
        """Run the engine's layer and keep what the op's modules are called with."""
        calls: list[Call] = []
        with _watched(self.ops(), calls):
            self.model(input_ids, positions, forward_batch)  # type: ignore[attr-defined]
        if sorted(call.path for call in calls) != sorted(self.paths):
            called = ", ".join(call.path for call in calls) or "nothing"
            raise BadInput(f"SGLang's layer called {called} instead of {', '.join(self.paths)}")
        for call in calls:
            for number, value in enumerate(call.tensors().values()):
                draw(self.recipe, value, number)
        return tuple(calls)

    def launch(self, step: Step) -> Any:
        """One forward of the op, and nothing else; of several modules, the last one's output."""
        output = None
        for call in step.calls:
            self._leave_inputs(call, step.batch)
            output = self.layer.get_submodule(call.path)(*call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _leave_inputs(self, call: Call, batch: Any) -> None:
        """What the layer leaves aside for a latent attention just before it calls it; no kernel.

        The attention fetches its first product from there (``LayerCommunicator.prepare_attn``).
        """
        for value in call.kwargs.values():
            if isinstance(value, BumpAllocator):
                value._pointer = 0  # the engine makes one a step, for all layers
        communicator = getattr(self.layer, "layer_communicator", None)
        latent = getattr(communicator, "qkv_latent_func", None)
        if call.path == "self_attn" and latent is not None:
            hidden = call.kwargs["hidden_states"]
            get_attn_tp_context().set_attn_inputs(AttentionInputs(hidden, batch, latent))


def one_layer(engine: type[Any], paths: Sequence[str], engine_layer: int = 0) -> type[Any]:
    """The engine's model class with :class:`OneLayer` before it."""
    fields = {"__module__": __name__, "paths": (*paths,), "engine_layer": engine_layer}
    return type("OneLayerModel", (OneLayer, engine), fields)


def overwrite(targets: Sequence[Call], sources: Sequence[Call]) -> None:
    """Copy the tensors of a step's calls over those of another step of the same size."""
    for target, source in zip(targets, sources, strict=True):
        pairs = zip(_leaves(target), _leaves(source), strict=True)
        for old, new in pairs:
            if isinstance(old, torch.Tensor):
                old.copy_(new)


@contextmanager
def _watched(modules: Mapping[str, Any], calls: list[Call]) -> Iterator[None]:
    """Append every call of the modules, with copies of its tensors, just before it is made."""
    handles = []
    for path, module in modules.items():

        def hook(module: Any, args: Any, kwargs: Any, path: str = path) -> None:
            names = tuple(inspect.signature(module.forward).parameters)[: len(args)]
            kept = tree.tree_map(_copy, (args, kwargs))
            calls.append(Call(path, names, *kept))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> Any:
    """A tensor's copy with its strides: a slice of a fused product keeps its distance of rows."""
    if not isinstance(value, torch.Tensor):
        return value
    copied = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    )
    return copied.copy_(value)


def _leaves(call: Call) -> list[Any]:
    return list(tree.tree_leaves((call.args, call.kwargs)))
