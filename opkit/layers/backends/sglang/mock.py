"""The mock of any op on SGLang: the worker, and what it tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sglang
import torch

from opkit.errors import BadInput
from opkit.layers import prompts
from opkit.layers.backends import shared
from opkit.layers.backends.sglang import config as configuration
from opkit.layers.backends.sglang import engine, models, worker
from opkit.layers.backends.sglang.worker import LayerWorker, pool_buffers
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.op import LaunchMode, Op
from opkit.layers.operands import dtype_name, sample, sample_experts, watch
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import (
    gpu_versions,
    loaded_below,
    mock_manifest,
    module_digests,
    source_digests,
)
from opkit.layers.recipes import recipe_of

_DUMMY = "SGLang's dummy weights: uniform in ±1e-3, seed 1234 for every parameter"


@dataclass
class About:
    """What an op tells of its module.

    Attributes:
        model, dtypes: keys of ``Manifest.model`` and ``Manifest.dtypes``.
        width: elements of a row of its output.
        notes: in what it knowingly differs from the server.
    """

    model: dict[str, Any]
    dtypes: dict[str, str]
    width: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build:
    """How an op's mock is built on SGLang.

    Attributes:
        paths: its modules below a decoder layer, in the order of their calls.
        about: what to tell of them, from the worker.
        caches: names of the pool's tensors, see
            :func:`opkit.layers.backends.sglang.worker.pool_buffers`; empty: the op has none.
        overrides: further values for ``config.json``.
        layer: the engine's layer that the mock stands for, unless the plan names a later one.
        functions: prefixes of SGLang's modules that hold functions of the op beside its classes.
    """

    paths: tuple[str, ...]
    about: Callable[[LayerWorker], About]
    caches: tuple[str, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    layer: int = 0
    functions: tuple[str, ...] = ()


class SglangMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan, op: Op, build: Build) -> None:
        if plan.inputs == "captured":
            raise BadInput(
                "captured inputs of SGLang cannot be replayed yet", "use inputs tokens or normal"
            )
        self.plan = plan
        self.build = build
        self.layer = max(plan.layer, build.layer)
        self.worker = LayerWorker(plan, op, build.paths, build.overrides, self.layer)

    @property
    def shape(self) -> Any:
        """The model's configuration, with one rank's share of its sizes."""
        return self.worker.runner.model_config.hf_config

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        return self.worker.prepare(planned)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        prepared, step = self.worker.prepared, self.worker.step
        assert prepared is not None
        assert step is not None
        case = prepared.case
        inputs = {name: value for call in step.calls for name, value in call.tensors().items()}
        return Probe(
            inputs=inputs,
            shape=(case.batch * case.tokens, self.build.about(self.worker).width),
            dtype=dtype_name(self.worker.runner.dtype),
            caches=self.worker.cache_views(self._caches()),
        )

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """Weights and inputs of large GEMMs, weights of experts, and the op's own arguments.

        Runs eagerly, whatever the case's mode: a replayed graph calls no module.
        """
        forward = self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        phase, step, found = planned.case.phase, self.worker.step, []
        assert step is not None
        for path, module in self.worker.model.ops().items():
            found += sample_experts(path, module)
        for call in step.calls:
            for name, value in call.tensors().items():
                if value.is_floating_point():
                    found.append(sample(f"{phase} {name}", value))
        for path, module in self.worker.model.ops().items():
            if not _linear(module):  # a module that is one product itself is sampled above
                found += watch(module, forward, phase, {})
            else:
                found.append(sample(f"{path}.weight", module.weight))
        return tuple({operand.name: operand for operand in found}.values())

    def describe(self) -> Manifest:
        """Versions, shapes, dtypes, sources and the recipe of inputs."""
        about = self.build.about(self.worker)
        return mock_manifest(
            self.plan,
            versions={"sglang": sglang.__version__, **gpu_versions(torch)},
            model={
                "architecture": self.shape.architectures[0],
                "hidden_size": self.shape.hidden_size,
                **about.model,
            },
            dtypes={"activations": dtype_name(self.worker.runner.dtype), **about.dtypes},
            sources=self._sources(),
            recipe=recipe_of(
                self.plan,
                "" if self.worker.checkpoint else _DUMMY,
                self.layer,
                self.worker.args.chunked_prefill_size,
                cached=bool(self.build.caches),
            ),
            notes=(*about.notes, *self._notes()),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self.worker.close()

    def _caches(self) -> dict[str, Any]:
        """The op's caches by name."""
        if not self.build.caches:
            return {}
        buffers = pool_buffers(self.worker.runner.token_to_kv_pool)
        return dict(zip(self.build.caches, buffers, strict=True))

    def _sources(self) -> dict[str, str]:
        """Digests of every SGLang file that the op is made of, and of opkit's mock."""
        runner, model = self.worker.runner, self.worker.model
        parts = [part for module in model.ops().values() for part in module.modules()]
        made = [*parts, model, model.layer, runner, runner.attn_backend, runner.eager_runner]
        made += [runner.decode_cuda_graph_runner, runner.token_to_kv_pool, self, self.worker]
        for part in parts:
            made += [getattr(part, name, None) for name in ("quant_method", "runner", "dispatcher")]
        # Forward methods are mixed in from files of their own.
        classes = {known for part in made for known in type(part).__mro__}
        functions = loaded_below(self.build.functions)
        own = (configuration, engine, models, shared, worker, prompts)
        return source_digests(classes, ("sglang", "opkit")) | module_digests((*own, *functions))

    def _notes(self) -> tuple[str, ...]:
        """In what this mock knowingly differs from the server."""
        notes = [f"module taken from the engine's own {type(self.worker.model.layer).__name__}"]
        if self.plan.tp_size > 1:
            notes.append(
                f"tensor parallelism of {self.plan.tp_size} simulated: one rank's share, and no "
                "all-reduce"
            )
        prefill = self.worker.args.cuda_graph_config.prefill
        if prefill.backend != "disabled":
            notes.append(
                f"a server of these flags replays prefill steps of up to {prefill.max_bs or 0:,} "
                f"tokens from graphs ({prefill.backend}), the mock launches every prefill eagerly"
            )
        if why := shared.drawn_weights(self.plan, self.worker.load_format):
            notes.append(why)
        return tuple(notes)


def _linear(module: Any) -> bool:
    """Whether the module is a single product."""
    return not list(module.children()) and getattr(module, "weight", None) is not None
