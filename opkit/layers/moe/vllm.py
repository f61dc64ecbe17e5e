"""The MoE mock of vLLM: the ``experts`` module (``MoERunner``), out of the engine's own layer.

Source: vLLM 0.24.0, ``model_executor/layers/fused_moe/``. Mixtral computes router logits before the
module; Qwen3-MoE and DeepSeek have their gate, DeepSeek also its shared experts, inside it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import set_forward_context

from opkit.errors import BadInput
from opkit.layers.backends.vllm.config import model_json
from opkit.layers.backends.vllm.mock import About, Build, VllmMock
from opkit.layers.backends.vllm.models import OneLayerModel
from opkit.layers.geometry import Geometry, read_geometry
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.moe import MOE, experts_path, from_the_first
from opkit.layers.moe.routing import driven_states
from opkit.layers.op import LaunchMode, MoeCase
from opkit.layers.operands import dtype_name, sample, sample_experts
from opkit.layers.plan import Plan, PlannedCase


class MoeMock(VllmMock):
    """See :class:`opkit.layers.mock.Mock`; also runs steps whose routing is driven."""

    def __init__(self, plan: Plan, geometry: Geometry, build: Build) -> None:
        super().__init__(plan, MOE, build)
        self._geometry = geometry
        self._launcher = Launcher()
        self._driven: tuple[MoeCase, dict[str, Any]] | None = None

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._launcher.free()
        self._driven = None
        if not isinstance(planned.case, MoeCase):
            return super().prepare(planned)
        case = planned.case
        ((path, experts),) = self.model.ops().items()
        inputs = self._steered(case, experts)
        self._driven = case, {f"{path}/{name}": value for name, value in inputs.items()}

        def forward() -> Any:
            with (
                torch.inference_mode(),
                set_forward_context(None, self.worker.config, num_tokens=case.tokens),
            ):
                return experts(**inputs)

        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        if self._driven is None:
            return super().probe()
        case, inputs = self._driven
        shape = (case.tokens, self._geometry.hidden_size)
        return Probe(inputs, shape, dtype_name(self.worker.config.model_config.dtype))

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`."""
        if not isinstance(planned.case, MoeCase):
            return super().operands(planned)
        self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        assert self._driven is not None
        ((path, experts),) = self.model.ops().items()
        weights = sample_experts(path, experts)
        inputs = [sample(name, value) for name, value in self._driven[1].items()]
        return (*weights, *inputs)

    def _steered(self, case: MoeCase, experts: Any) -> dict[str, Any]:
        """Hidden states and router logits that send the tokens where the rule says.

        A gate inside the module is steered by the hidden states; router logits given from outside
        come from the same hidden states by the layer's own gate.
        """
        layout = self._geometry.experts
        assert layout is not None
        gate = experts.gate if experts.gate is not None else self._outer_gate()
        dtype = self.worker.config.model_config.dtype
        hidden = driven_states(case, layout, gate, self.plan.seed, dtype, torch)
        if experts.gate is not None:
            return {"hidden_states": hidden, "router_logits": hidden}
        with torch.inference_mode():
            logits = gate(hidden)[0]
        return {"hidden_states": hidden, "router_logits": logits}

    def _outer_gate(self) -> Any:
        path = self.build.paths[0].rpartition(".")[0]
        return self.model.engine.model.layers[0].get_submodule(path).gate


def build(plan: Plan) -> MoeMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no experts.
    """
    geometry = read_geometry(plan.model)
    if geometry.experts is None:
        raise BadInput(f"{plan.model}: no experts in this model", "its MLP is the op gemm's")

    def about(model: OneLayerModel, shape: Any) -> About:
        del shape
        assert geometry.experts is not None
        ((_, experts),) = model.ops().items()
        parts = ("gate", experts.gate), ("shared experts", experts.shared_experts)
        return About(
            model={
                "inter_size": geometry.experts.intermediate_size,
                "topk": geometry.experts.topk,
                "num_experts": geometry.experts.number,
                "includes": ", ".join(name for name, part in parts if part is not None),
            },
            dtypes={
                "weights": dtype_name(next(p.dtype for p in experts.parameters() if p.ndim == 3)),
                "kv_cache": "none",  # the op has none
            },
            width=geometry.hidden_size,
        )

    return MoeMock(
        plan,
        geometry,
        Build(
            (experts_path(geometry.architecture),),
            about,
            layer=geometry.experts.first_dense,
            overrides=from_the_first(model_json(plan.model)),
            cached=False,
            functions=("vllm.model_executor.layers.fused_moe.",),
        ),
    )
