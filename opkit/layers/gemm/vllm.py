"""The gemm mock of vLLM: a dense layer's own linear modules, or one of any size.

Source: vLLM 0.24.0, ``model_executor/layers/linear.py``. A single product is a
``ReplicatedLinear``, whose forward is what column- and row-parallel layers do on one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import initialize_dummy_weights
from vllm.utils.torch_utils import set_default_torch_dtype

from opkit.errors import BadInput
from opkit.layers.backends.vllm.mock import About, Build, VllmMock
from opkit.layers.backends.vllm.models import OneLayerModel
from opkit.layers.gemm import GEMM, LINEARS
from opkit.layers.geometry import read_geometry
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.op import GemmCase
from opkit.layers.operands import dtype_name, sample
from opkit.layers.plan import Plan, PlannedCase


class GemmMock(VllmMock):
    """See :class:`opkit.layers.mock.Mock`; also runs single products."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, GEMM, Build(LINEARS, _about, cached=False))
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
            with torch.inference_mode():
                return linear(activations)[0]

        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        if self._single is None:
            return super().probe()
        case, _, activations = self._single
        dtype = dtype_name(self.worker.config.model_config.dtype)
        return Probe({"input": activations}, (case.m, case.n), dtype)

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`."""
        if isinstance(planned.case, GemmCase):
            linear, activations = self._product(planned.case)
            return sample("weight", linear.weight), sample("input", activations)
        found = super().operands(planned)
        weights = [
            sample(f"{path}.weight", module.weight) for path, module in self.model.ops().items()
        ]
        return (*(item for item in found if "weight" not in item.name), *weights)

    def _product(self, case: GemmCase) -> tuple[Any, Any]:
        """The linear layer and the activations of a single product, kept for the case in hand.

        Raises:
            BadInput: vLLM multiplies these element types only in a quantised model.
        """
        if self._single is not None and self._single[0] == case:
            return self._single[1:]
        config = self.worker.config
        if config.quant_config is not None:
            raise BadInput(
                f"{case.label()}: single products of a quantised server are not mocked on vLLM",
                "collect with unquantised flags, or use --backend torch (fp8: one scale a tensor)",
            )
        if case.dtype != dtype_name(config.model_config.dtype):
            raise BadInput(
                f"{case.label()}: this server's linear layers are "
                f"{dtype_name(config.model_config.dtype)}",
                "use --backend torch, which multiplies float8 with one scale a tensor",
            )
        self._single = None
        device = torch.device(config.device_config.device)
        with (
            set_current_vllm_config(config),
            set_default_torch_dtype(config.model_config.dtype),
            device,
        ):
            linear = ReplicatedLinear(case.k, case.n, bias=False, prefix="opkit.product")
        initialize_dummy_weights(linear, config.model_config)
        process_weights_after_loading(linear, config.model_config, device)
        stream = torch.Generator(device).manual_seed(self.plan.seed)
        activations = torch.randn(
            case.m, case.k, generator=stream, dtype=config.model_config.dtype, device=device
        )
        self._single = case, linear, activations
        return linear, activations


def _about(model: OneLayerModel, shape: Any) -> About:
    linears = {path: list(module.weight.shape) for path, module in model.ops().items()}
    dtypes = {dtype_name(module.weight.dtype) for module in model.ops().values()}
    return About(
        model={"linears": linears},
        dtypes={"weights": ", ".join(sorted(dtypes)), "kv_cache": "none"},
        width=shape.hidden_size,
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
