"""The mock of any op on vLLM: the worker, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import CompilationMode

from opkit.layers import captured, prompts
from opkit.layers.backends import shared
from opkit.layers.backends.vllm import config as configuration
from opkit.layers.backends.vllm import models
from opkit.layers.backends.vllm.config import server_args
from opkit.layers.backends.vllm.models import OneLayerModel, inside
from opkit.layers.backends.vllm.worker import LayerWorker
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.model_config import read_config
from opkit.layers.op import LaunchMode, Op
from opkit.layers.operands import dtype_name, sample, sample_experts, watch
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import (
    file_digest,
    gpu_versions,
    loaded_below,
    mock_manifest,
    module_digests,
    source_digests,
)
from opkit.layers.recipes import recipe_of

_DUMMY = "vLLM's dummy weights: uniform in ±1e-3, seed 1234 for every parameter"


@dataclass
class About:
    """What an op tells of its module.

    Attributes:
        model, dtypes: keys of ``Manifest.model`` and ``Manifest.dtypes``.
        width: elements of a row of its output, from the configuration.
    """

    model: dict[str, Any]
    dtypes: dict[str, str]
    width: int


@dataclass(frozen=True)
class Build:
    """How an op's mock is built on vLLM.

    Attributes:
        paths: its modules below a decoder layer, in the order of their calls.
        about: what to tell of them, from the model and its (local) configuration.
        own: the op's own one-layer model; None: the modules of the engine's own model.
        watched: further submodules whose arguments are sampled, see
            :func:`opkit.layers.operands.watch`.
        layer: the engine's layer that the mock stands for, unless the plan names a later one.
        overrides: further values for ``config.json``.
        cached: whether the op has a KV cache of its own.
        functions: prefixes of vLLM's modules that hold functions of the op beside its classes.
    """

    paths: tuple[str, ...]
    about: Callable[[OneLayerModel, Any], About]
    own: type[OneLayerModel] | None = None
    watched: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    layer: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    functions: tuple[str, ...] = ()


class VllmMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan, op: Op, build: Build) -> None:
        self.plan = plan
        self.build = build
        self.layer = max(plan.layer, build.layer)
        if plan.inputs == "captured":  # before the GPU is touched
            stored = captured.Captured(Path(plan.captured), plan.op, plan.backend)
            stored.require(self.layer, file_digest(Path(read_config(plan.model)[1])))
        own = build.own if not plan.strict and not self._checkpoint() else None

        def model_of(config: Any) -> type[OneLayerModel]:
            return own or inside(config, build.paths, self.layer)

        self.worker = LayerWorker(plan, op, model_of, build.overrides)

    @property
    def model(self) -> OneLayerModel:
        """The one-layer model."""
        return self.worker.model

    @property
    def shape(self) -> Any:
        """The model's configuration, with one rank's share of its sizes."""
        return self.worker.config.model_config.hf_config

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        return self.worker.prepare(planned)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        case = self.worker.prepared.case
        return Probe(
            inputs=self.worker.inputs(),
            shape=(case.batch * case.tokens, self.build.about(self.model, self.shape).width),
            dtype=dtype_name(self.worker.config.model_config.dtype),
            caches=self.worker.caches() if self.build.cached else (),
        )

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """Weights and inputs of large GEMMs, weights of experts, and the op's own arguments.

        Runs eagerly, whatever the case's mode: a replayed graph calls no module.
        """
        forward = self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        phase, found = planned.case.phase, []
        for path, module in self.model.ops().items():
            found += sample_experts(path, module)
        for name, value in self.worker.inputs().items():
            if value.is_floating_point():
                found.append(sample(f"{phase} {name}", value))
        for module in self.model.ops().values():
            found += watch(module, forward, phase, self.build.watched)
        return tuple({operand.name: operand for operand in found}.values())

    def describe(self) -> Manifest:
        """Versions, shapes, dtypes, sources and the recipe of inputs."""
        about = self.build.about(self.model, self.shape)
        return mock_manifest(
            self.plan,
            versions={"vllm": vllm.__version__, **gpu_versions(torch)},
            model={
                "architecture": self.shape.architectures[0],
                "hidden_size": self.shape.hidden_size,
                **about.model,
            },
            dtypes={
                "activations": dtype_name(self.worker.config.model_config.dtype),
                **about.dtypes,
            },
            sources=self._sources(),
            recipe=recipe_of(
                self.plan,
                "" if self._checkpoint() else _DUMMY,
                self.layer,
                self.worker.config.scheduler_config.max_num_batched_tokens,
                cached=self.build.cached,
            ),
            notes=self._notes(),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self.worker.close()

    def _checkpoint(self) -> bool:
        return shared.loads_checkpoint(self.plan, server_args(self.plan).load_format)

    def _sources(self) -> dict[str, str]:
        """Digests of every vLLM file that the op is made of, and of opkit's mock."""
        parts = [part for module in self.model.ops().values() for part in module.modules()]
        classes = {type(part) for part in parts} | {type(self.worker), *type(self).__mro__}
        classes |= {
            type(getattr(part, name))
            for part in parts
            for name in ("impl", "quant_method", "scheme")
            if getattr(part, name, None) is not None
        }
        # An own model is a class of its op's file; the engine's layer says how its modules are fed.
        classes.add(getattr(self.model, "layer_class", type(self.model)))
        for group in self.worker.runner._attn_group_iterator():
            classes |= {group.backend, type(group.get_metadata_builder())}
        # Not only classes make the layer: its limits and its tokens come out of functions.
        own = (configuration, models, shared, prompts, captured)
        functions = loaded_below(self.build.functions)
        return source_digests(classes, ("vllm", "opkit")) | module_digests((*own, *functions))

    def _notes(self) -> tuple[str, ...]:
        """In what this mock knowingly differs from the server."""
        notes = []
        if self.plan.tp_size > 1:
            notes.append(
                f"tensor parallelism of {self.plan.tp_size} simulated: one rank's share, and no "
                "all-reduce"
            )
        mode = self.worker.args.compilation_config.mode
        if mode != CompilationMode.NONE and not self.worker.args.enforce_eager:
            named = "its default mode" if mode is None else f"mode {mode}"
            notes.append(f"the server compiles its model ({named}), the mock does not")
        if why := shared.drawn_weights(self.plan, self.worker.args.load_format):
            notes.append(why)
        if hasattr(self.model, "layer_class"):
            name = self.model.layer_class.__name__
            notes.append(f"module taken from the engine's own {name}")
        return tuple(notes)
