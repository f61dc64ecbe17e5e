"""The mock of any op on TensorRT-LLM: the worker, and what it tells of itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.trtllm import caches, config, layer, probe, worker
from opkit.layers.backends.trtllm.config import requests_of
from opkit.layers.backends.trtllm.layer import Call, Seam, redraw, replay
from opkit.layers.backends.trtllm.probe import WRITTEN_AGAINST, Upstream
from opkit.layers.backends.trtllm.worker import TUNER_CACHE, LayerWorker
from opkit.layers.captured import Captured
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import CacheView, Forward, Probe
from opkit.layers.op import Case, LaunchMode, Op
from opkit.layers.operands import dtype_name, sample, sample_experts, watch
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import (
    gpu_versions,
    mock_manifest,
    module_digests,
    source_digests,
)

DUMMY_WEIGHTS = (
    "TensorRT-LLM's dummy weights (load_format dummy): uniform in ±1e-3, FP8 in ±3; a generator of "
    "seed 0 for every parameter"
)
_INPUTS = {
    "tokens": "prompt_tokens(seed={seed}, request 0 to batch-1), through the engine's own model of "
    "one layer",
    "normal": "normal(0, 1) in every two-dimensional floating-point argument",
    "captured": "captured from the engine's layer: {folder}; replayed: {names}",
    "zeros": "zeros: degenerate on purpose",
    "rows": "the first row in all rows: degenerate on purpose",
}
_CACHES = {
    "prefilled": "the same prompts prefilled through the layer, one request a step, at most "
    "{limit:,} tokens a step",
    "pooled": "the first request's prompt prefilled through the layer, at most 8,192 tokens, its "
    "blocks repeated over the blocks of the case",
}


@dataclass
class About:
    """What an op tells of its module.

    Attributes:
        model, dtypes: keys of ``Manifest.model`` and ``Manifest.dtypes``.
        width: elements of a row of its output.
    """

    model: dict[str, Any]
    dtypes: dict[str, str]
    width: int


@dataclass(frozen=True)
class Build:
    """How an op's mock is built on TensorRT-LLM.

    Attributes:
        seams: where the op begins in a decoder layer, in the order of the calls.
        about: what to tell of it, from the worker and the calls of the case prepared last.
        overrides: further values for ``config.json``.
        cached: whether the op has a KV cache of its own.
        check: raises when the layer that was built is not what the op means.
    """

    seams: tuple[Seam, ...]
    about: Callable[[LayerWorker, Sequence[Call]], About]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    check: Callable[[LayerWorker], None] = lambda _: None


class TrtllmMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan, op: Op, build: Build, upstream: Upstream | None = None) -> None:
        self.plan, self.build = plan, build
        self.upstream = upstream or Upstream()
        self.worker = LayerWorker(plan, op, build.overrides, self.upstream)
        try:
            for seam in build.seams:
                layer.module_of(self.upstream, self.worker.layer, seam)
            build.check(self.worker)
            self._captured = None
            if plan.inputs == "captured":
                self._captured = Captured(Path(plan.captured), plan.op, plan.backend)
            with self.worker.torch.inference_mode():
                self.worker.tune()
        except BaseException:
            self.worker.close()
            raise
        self._replayed: tuple[str, ...] = ()
        self._launcher = Launcher()
        self._prepared: tuple[Any, list[Call]] | None = None

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._launcher.free()
        case, graph = planned.case, planned.mode is LaunchMode.GRAPH
        if graph:
            self.worker.check_graph(case)
        # As in the engine, whose tensors cannot be written to outside inference mode.
        with self.worker.torch.inference_mode():
            calls = self.worker.prepare(case, self.build.seams, graph=graph and self.build.cached)
            self.feed(case, calls)
        self._prepared = case, calls
        return self._launch(calls, planned.mode)

    def feed(self, case: Any, calls: Sequence[Call]) -> None:
        """Overwrite the op's inputs as the plan says."""
        if self._captured is None:
            redraw(calls, self.plan.inputs, self.plan.seed)
            return
        if not isinstance(case, Case):
            raise BadInput(f"{case.label()}: a captured step is a step of the engine")
        self._captured.select(case)
        rows = [(part.number, part.past, part.tokens) for part in requests_of(case)]
        self._replayed = replay(calls, self._captured, rows)
        if not self._replayed:
            raise BadInput(
                f"{self.plan.captured}: none of the op's inputs was captured: "
                f"{', '.join(name for call in calls for name in call.tensors())}"
            )

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        assert self._prepared is not None, "prepare comes first"
        case, calls = self._prepared
        tokens = sum(part.tokens for part in requests_of(case))
        return Probe(
            inputs={name: value for call in calls for name, value in call.tensors().items()},
            shape=(tokens, self.build.about(self.worker, calls).width),
            dtype=dtype_name(self.worker.model.model_config.torch_dtype),
            caches=self._views(case) if self.build.cached else (),
        )

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """Weights and inputs of large GEMMs, weights of experts, and the op's own arguments.

        Runs eagerly, whatever the case's mode: a replayed graph calls no module.
        """
        forward = self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        assert self._prepared is not None
        phase = getattr(planned.case, "phase", "step")
        found: list[Operand] = []
        for call in self._prepared[1]:
            for name, value in call.tensors().items():
                if value.is_floating_point() and value.ndim:
                    found.append(sample(f"{phase} {name}", value))
            if call.seam.method == "forward":
                found += sample_experts(call.seam.path, call.target)
                found += watch(call.target, forward, str(phase), {})
        return tuple({operand.name: operand for operand in found}.values())

    def describe(self) -> Manifest:
        """Versions, shapes, dtypes, sources and the recipe of inputs."""
        calls = self._prepared[1] if self._prepared else ()
        about = self.build.about(self.worker, calls)
        quantised = self.worker.cache.quantised().lower()
        activations = dtype_name(self.worker.model.model_config.torch_dtype)
        return mock_manifest(
            self.plan,
            versions={"tensorrt_llm": self.upstream.version, **gpu_versions(self.worker.torch)},
            model={
                "architecture": self.worker.geometry.architecture,
                "hidden_size": self.worker.geometry.hidden_size,
                **about.model,
            },
            dtypes={
                "activations": activations,
                "kv_cache": (quantised or activations) if self.build.cached else "none",
                **about.dtypes,
            },
            sources=self._sources(),
            recipe=self._recipe(),
            notes=self._notes(),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._launcher.free()
        self._prepared = None
        self.worker.close()

    def _launch(self, calls: Sequence[Call], mode: LaunchMode) -> Forward:
        """A function that repeats the calls, or replays a graph of them."""

        def forward() -> Any:
            output = None
            with self.worker.engine_context():
                for call in calls:
                    output = call.again()
            return output

        return self._launcher.launch(forward, mode)

    def _views(self, case: Any) -> tuple[CacheView, ...]:
        """The caches, with the blocks of the step's tokens and those wholly behind it."""
        size = self.worker.cache.tokens_per_block
        requests = requests_of(case)
        new, past = [], []
        for request, row in zip(requests, self.worker.cache.blocks(len(requests)), strict=True):
            new += row[request.past // size : -(-request.length // size)]
            past += row[: request.past // size]
        return tuple(
            CacheView(name, tensor, tuple(new), tuple(past))
            for name, tensor in self.worker.cache.tensors().items()
        )

    def _sources(self) -> dict[str, str]:
        """Digests of TensorRT-LLM's files that the op is made of, and of opkit's."""
        classes: set[type] = {type(self.worker.layer), type(self.worker.cache.manager)}
        classes |= {type(self.worker.metadata), type(self)}
        for seam in self.build.seams:
            top = layer.module_of(self.upstream, self.worker.layer, seam)
            for part in top.modules():
                held = (
                    getattr(part, name, None) for name in ("attn", "mqa", "mha", "quant_method")
                )
                classes |= {type(part), *(type(item) for item in held if item is not None)}
        own = module_digests((caches, config, layer, probe, worker))
        return source_digests(classes, ("tensorrt_llm", "opkit")) | own

    def _recipe(self) -> dict[str, str]:
        """How weights, activations and caches came to their values."""
        return {
            "weights": DUMMY_WEIGHTS,
            "activations": _INPUTS[self.plan.inputs].format(
                seed=self.plan.seed,
                folder=Path(self.plan.captured).name,
                names=", ".join(self._replayed),
            ),
            "kv_cache": _CACHES[self.plan.caches].format(limit=self.worker.cache.max_tokens),
            "limits": "the server's own" if self.plan.limits == "server" else "raised to the cases",
            "kv_cache_blocks": "as TensorRT-LLM's KV cache manager gives them to dummy requests, "
            f"{self.worker.cache.tokens_per_block} tokens each",
            "tuner_cache": tuner_cache(),
        }

    def _notes(self) -> tuple[str, ...]:
        """What the reader of the report should know."""
        notes = [
            WRITTEN_AGAINST,
            f"op taken from the engine's own {type(self.worker.layer).__name__}, strict or not",
        ]
        if self.plan.tp_size > 1:
            notes.append(
                f"tensor parallelism of {self.plan.tp_size} simulated: one rank's share, and no "
                "all-reduce"
            )
        if self.worker.server.options.get("load_format", "auto") != "dummy":
            notes.append("the mock draws its weights, though these flags load a checkpoint")
        if self.worker.server.ignored:
            notes.append(
                f"flags without meaning for a layer: {' '.join(self.worker.server.ignored)}"
            )
        return tuple(notes)


def tuner_cache() -> str:
    """Where the tuner's tactics are kept, for the manifest."""
    path = os.environ.get(TUNER_CACHE)
    if path:
        return f"{TUNER_CACHE}={path}"
    return (
        f"tuned in this process: {TUNER_CACHE} was not set, so tactics may differ from the server's"
    )


def latent_sizes(worker: LayerWorker) -> dict[str, Any]:
    """Sizes of latent attention, as the manifest has them."""
    size = worker.geometry
    assert size.latent is not None
    return {
        "num_heads": size.heads,
        "q_lora_rank": size.latent.q_lora_rank,
        "kv_lora_rank": size.latent.kv_lora_rank,
        "qk_nope_head_dim": size.latent.qk_nope_head_dim,
        "qk_rope_head_dim": size.latent.qk_rope_head_dim,
        "v_head_dim": size.latent.v_head_dim,
    }


def require_attention(worker: LayerWorker, holders: Sequence[str]) -> None:
    """Check that the attention in the layer is of the backend that was asked for.

    ``create_attention`` falls back to TensorRT-LLM's own backend where another is not there, and
    says so in a log line at most.

    Args:
        worker: holds the layer.
        holders: attributes of ``self_attn`` that may hold it.

    Raises:
        ToolMissing: it is of another backend, or none of the attributes is there.
    """
    attention = worker.layer.self_attn
    own = worker.upstream.get("TrtllmAttention")
    asked = str(worker.model.model_config.attn_backend)
    found = [getattr(attention, name, None) for name in holders]
    found = [item for item in found if item is not None]
    if not found:
        raise worker.upstream.drift(f"{type(attention).__name__} has no {' or '.join(holders)}")
    for item in found:
        if isinstance(item, own) is not (asked.upper() == "TRTLLM"):
            raise worker.upstream.drift(
                f"attention backend {asked} was asked for, create_attention made a "
                f"{type(item).__name__}"
            )
