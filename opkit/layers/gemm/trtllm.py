"""The gemm mock of TensorRT-LLM: a dense layer's own linear modules, or one ``Linear`` of any size.

Source: NVIDIA/TensorRT-LLM, ``_torch/modules/linear.py`` at 00bbf71. Not run.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.trtllm import probe
from opkit.layers.backends.trtllm.layer import Call, Seam, module_of, seams_of
from opkit.layers.backends.trtllm.mock import (
    About,
    Build,
    TrtllmMock,
    tuner_cache,
)
from opkit.layers.backends.trtllm.probe import WRITTEN_AGAINST, Upstream
from opkit.layers.backends.trtllm.worker import LayerWorker, require_gpu, sm_version
from opkit.layers.gemm import DTYPES, GEMM, LINEARS
from opkit.layers.geometry import read_geometry
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import Forward, Mock, Probe
from opkit.layers.op import GemmCase
from opkit.layers.operands import dtype_name, sample
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import base_versions, gpu_versions, op_digests, source_digests

probe.root()  # an ImportError here says that the backend is not installed

_DEVIATION = 0.02  # how models draw their linear layers at the start of training
_FP8_SM = 89  # Ada: the first GPUs whose tensor cores multiply float8
_FP8_MOST = 448.0  # largest float8_e4m3fn


class ProductMock:
    """One ``Linear``; see :class:`opkit.layers.mock.Mock`. It needs no model."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.upstream, self.torch = plan, Upstream(), require_gpu()
        self._launcher = Launcher()
        self._made: tuple[GemmCase, Any, Any] | None = None  # case, module, activations

    def prepare(self, planned: PlannedCase[GemmCase]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._launcher.free()
        module, activations = self._make(planned.case)

        def forward() -> Any:
            with self.torch.inference_mode():
                return module(activations)

        self._tune(forward)
        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        assert self._made is not None, "prepare comes first"
        case, _, activations = self._made
        return Probe({"input": activations}, (case.m, case.n), "bfloat16")

    def operands(self, planned: PlannedCase[GemmCase]) -> tuple[Operand, ...]:
        """The weight and the activations of a case."""
        module, activations = self._make(planned.case)
        return sample("weight", module.weight), sample("input", activations)

    def describe(self) -> Manifest:
        """Versions, element types, sources and the recipe of inputs."""
        dtypes = ", ".join(sorted({item.case.dtype for item in self.plan.cases}))
        return Manifest(
            side="mock",
            op=self.plan.op,
            backend=self.plan.backend,
            command=tuple(sys.argv),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={
                **base_versions(),
                "tensorrt_llm": self.upstream.version,
                **gpu_versions(self.torch),
            },
            dtypes={"weights": dtypes, "activations": "bfloat16", "output": "bfloat16"},
            tp_size=self.plan.tp_size,
            engine_args=self.plan.engine_args,
            layer_source=source_digests(
                (self.upstream.get("Linear"), ProductMock), ("tensorrt_llm", "opkit")
            )
            | op_digests("gemm", "trtllm"),
            recipe={
                "weights": f"normal(0, {_DEVIATION}), torch.Generator of the plan's seed, role and "
                "shape; one tensor, used by every iteration",
                "activations": "normal(0, 1), bfloat16, the same way",
                "float8": "one scale a tensor; the module quantises its input in each forward, "
                "without a calibrated scale",
                "tuner_cache": tuner_cache(),
            },
            notes=(WRITTEN_AGAINST,),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._launcher.free()
        self._made = None
        self.torch.cuda.empty_cache()

    def _make(self, case: GemmCase) -> tuple[Any, Any]:
        """The module and the activations of a case; made when it is another one."""
        if self._made is None or self._made[0] != case:
            self._made = None  # freed before the next is made
            self._made = case, self._module(case), self._draw("activations", case.m, case.k, 1.0)
        return self._made[1], self._made[2]

    def _module(self, case: GemmCase) -> Any:
        if case.dtype not in DTYPES:
            raise BadInput(f"gemm has no element type {case.dtype!r}; known: {', '.join(DTYPES)}")
        weight = self._draw("weight", case.n, case.k, _DEVIATION)
        weights, quantised = {"weight": weight}, None
        if case.dtype != "bfloat16":
            if sm_version(self.torch) < _FP8_SM:
                raise BadInput(f"{self.torch.cuda.get_device_name(0)} multiplies no float8")
            quantised = self.upstream.call(
                "QuantConfig", must={"quant_algo": self.upstream.get("QuantAlgo").FP8}
            )
            scale = weight.abs().max().float() / _FP8_MOST
            weights = {
                "weight": (weight / scale.to(weight.dtype)).to(self.torch.float8_e4m3fn),
                "weight_scale": scale.reshape(1),
            }
        module = self.upstream.call(
            "Linear",
            case.k,
            case.n,
            must={"bias": False, "dtype": self.torch.bfloat16, "quant_config": quantised},
            may={"reduce_output": False},
        ).to("cuda")
        module.load_weights([weights])
        if hasattr(module, "post_load_weights"):
            module.post_load_weights()
        return module

    def _draw(self, role: str, rows: int, columns: int, deviation: float) -> Any:
        """Normal values [rows, columns]; which ones depends on the seed, the role and the shape."""
        text = f"opkit gemm {self.plan.seed} {role} {rows} {columns}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        stream = self.torch.Generator("cuda").manual_seed(seed)
        return self.torch.randn(
            rows, columns, generator=stream, dtype=self.torch.bfloat16, device="cuda"
        ).mul_(deviation)

    def _tune(self, forward: Forward) -> None:
        """Let TensorRT-LLM's tuner choose tactics for the case."""
        tune = self.upstream.get("autotune")
        with tune():
            forward()
            self.torch.cuda.synchronize()


def _about(worker: LayerWorker, calls: Sequence[Call]) -> About:
    del calls
    linears = {path: module_of(worker.upstream, worker.layer, Seam(path)) for path in LINEARS}
    return About(
        model={
            "linears": {
                path: [item.out_features, item.in_features] for path, item in linears.items()
            }
        },
        dtypes={"weights": dtype_name(linears[LINEARS[0]].weight.dtype)},
        width=linears[LINEARS[-1]].out_features,
    )


def build(plan: Plan) -> Mock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: single products beside steps of a model, or a model without these linears.
        ToolMissing: no GPU, or a TensorRT-LLM that opkit does not know.
    """
    single = [isinstance(item.case, GemmCase) for item in plan.cases]
    if all(single):
        return ProductMock(plan)
    if any(single):
        raise BadInput("single products and steps of a model need a plan each")
    geometry = read_geometry(plan.model)
    if geometry.latent is not None or (geometry.experts and geometry.experts.in_layer(0)):
        raise BadInput(
            f"{plan.model}: its first layer has not the linear modules of a dense layer "
            f"({', '.join(LINEARS)})"
        )
    return TrtllmMock(
        plan, GEMM, Build(seams_of("gemm", geometry.architecture), _about, cached=False)
    )
