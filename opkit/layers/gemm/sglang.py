"""The gemm mock of SGLang: a dense layer's own linear modules, or one of any size.

Source: SGLang 0.5.14, ``layers/linear.py``. A single product is a ``ReplicatedLinear``, whose
forward is what column- and row-parallel layers do on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

from opkit.errors import BadInput
from opkit.layers.backends.sglang.mock import About, Build, SglangMock
from opkit.layers.backends.sglang.worker import LayerWorker
from opkit.layers.gemm import GEMM, LINEARS
from opkit.layers.geometry import read_geometry
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.op import GemmCase
from opkit.layers.operands import dtype_name, sample
from opkit.layers.plan import Plan, PlannedCase


class GemmMock(SglangMock):
    """See :class:`opkit.layers.mock.Mock`; also runs single products."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, GEMM, Build(LINEARS, _about))
        self._launcher = Launcher()
        self._single: tuple[GemmCase, Any, Any] | None = None  # case, linear, activations

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._launcher.free()
        if not isinstance(planned.case, GemmCase):
            self._single = None
            return super().prepare(planned)
        linear, activations = self._product(planned.case)

        def forward() -> Any:
            with torch.no_grad():
                return linear(activations)[0]

        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        if self._single is None:
            return super().probe()
        case, _, activations = self._single
        return Probe({"input": activations}, (case.m, case.n), dtype_name(self.worker.runner.dtype))

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`."""
        if isinstance(planned.case, GemmCase):
            linear, activations = self._product(planned.case)
            return sample("weight", linear.weight), sample("input", activations)
        return super().operands(planned)

    def _product(self, case: GemmCase) -> tuple[Any, Any]:
        """The linear layer and the activations of a single product, kept for the case in hand.

        Raises:
            BadInput: this server's linear layers have another element type.
        """
        if self._single is not None and self._single[0] == case:
            return self._single[1:]
        self._single = None
        runner = self.worker.runner
        device = torch.device(runner.device)
        quantised = getattr(runner.model, "quant_config", None)
        with set_default_torch_dtype(runner.dtype), device, torch.no_grad():
            linear = ReplicatedLinear(
                case.k, case.n, bias=False, quant_config=quantised, prefix="opkit.product"
            )
            initialize_dummy_weights(linear)
            linear.quant_method.process_weights_after_loading(linear)
        found = dtype_name(linear.weight.dtype)
        if found != case.dtype:
            raise BadInput(
                f"{case.label()}: this server's linear layers are {found}",
                "give flags that quantise it (--quantization fp8), or use --backend torch",
            )
        stream = torch.Generator(device).manual_seed(self.plan.seed)
        activations = torch.randn(
            case.m, case.k, generator=stream, dtype=runner.dtype, device=device
        )
        self._single = case, linear, activations
        return linear, activations


def _about(worker: LayerWorker) -> About:
    modules = worker.model.ops()
    return About(
        model={"linears": {path: list(module.weight.shape) for path, module in modules.items()}},
        dtypes={
            "weights": ", ".join(sorted({dtype_name(m.weight.dtype) for m in modules.values()})),
            "kv_cache": "none",
        },
        width=worker.runner.model_config.hf_config.hidden_size,
    )


def build(plan: Plan) -> GemmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model's layers are not dense ones with a fused query, key and value product.
    """
    geometry = read_geometry(plan.model)
    if geometry.latent is not None or geometry.experts is not None:
        raise BadInput(
            f"{plan.model}: the op gemm is a dense layer's ({', '.join(LINEARS)})",
            "a latent attention's products are part of mla and dsa, experts' of moe",
        )
    return GemmMock(plan)
