"""The MoE mock of SGLang: the ``experts`` module (``FusedMoE``), out of the engine's own layer.

Source: SGLang 0.5.14, ``layers/moe/fused_moe_triton/layer.py``. Gate and top-k are modules of their
own before it; DeepSeek-V3's shared expert is part of it where the engine fuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

from opkit.errors import BadInput
from opkit.layers.backends.sglang.mock import About, Build, SglangMock
from opkit.layers.backends.sglang.models import Call
from opkit.layers.backends.sglang.worker import LayerWorker
from opkit.layers.geometry import Geometry, read_geometry
from opkit.layers.graphs import Launcher
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.model_config import read_config
from opkit.layers.moe import MOE, experts_path, from_the_first
from opkit.layers.moe.routing import driven_states
from opkit.layers.op import LaunchMode, MoeCase
from opkit.layers.operands import dtype_name, sample, sample_experts
from opkit.layers.plan import Plan, PlannedCase

_FUNCTIONS = ("sglang.srt.layers.moe.moe_runner.", "sglang.srt.layers.moe.fused_moe_triton.")


class MoeMock(SglangMock):
    """See :class:`opkit.layers.mock.Mock`; also runs steps whose routing is driven."""

    def __init__(self, plan: Plan, geometry: Geometry, build: Build) -> None:
        super().__init__(plan, MOE, build)
        self._geometry = geometry
        self._launcher = Launcher()
        self._driven: tuple[MoeCase, Call] | None = None

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._launcher.free()
        self._driven = None
        if not isinstance(planned.case, MoeCase):
            return super().prepare(planned)
        ((path, experts),) = self.worker.model.ops().items()
        call = self._steered(planned.case, path)
        self._driven = planned.case, call
        context = ForwardContext(attn_backend=self.worker.runner.attn_backend)

        def forward() -> Any:
            with torch.no_grad(), forward_context(context):
                return experts(*call.args)

        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        if self._driven is None:
            return super().probe()
        case, call = self._driven
        shape = (case.tokens, self._geometry.hidden_size)
        return Probe(call.tensors(), shape, dtype_name(self.worker.runner.dtype))

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`."""
        if not isinstance(planned.case, MoeCase):
            return super().operands(planned)
        self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        assert self._driven is not None
        ((path, experts),) = self.worker.model.ops().items()
        weights = sample_experts(path, experts)
        inputs = [sample(name, value) for name, value in self._driven[1].tensors().items()]
        return (*weights, *inputs)

    def _steered(self, case: MoeCase, path: str) -> Call:
        """The experts' call for hidden states that the layer's router sends where the rule says."""
        layout = self._geometry.experts
        assert layout is not None
        block = self.worker.model.layer.get_submodule(path.rpartition(".")[0])
        gate, dtype = block.gate, self.worker.runner.dtype
        hidden = driven_states(case, layout, gate, self.plan.seed, dtype, torch)
        context = ForwardContext(attn_backend=self.worker.runner.attn_backend)
        with torch.no_grad(), forward_context(context):
            logits = gate(hidden)
            logits = logits[0] if isinstance(logits, tuple) else logits
            picked = block.topk(hidden, logits)
        return Call(path, ("hidden_states", "topk_output"), (hidden, picked), {})


def build(plan: Plan) -> MoeMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no experts.
    """
    geometry = read_geometry(plan.model)
    layout = geometry.experts
    if layout is None:
        raise BadInput(f"{plan.model}: no experts in this model", "its MLP is the op gemm's")
    path = experts_path(geometry.architecture)
    stored, _ = read_config(plan.model)

    def about(worker: LayerWorker) -> About:
        experts = worker.model.ops()[path]
        fused = experts.num_fused_shared_experts if _fuses(experts) else 0
        return About(
            model={
                "inter_size": layout.intermediate_size,
                "topk": layout.topk,
                "num_experts": layout.number,
                "includes": "shared experts" if fused else "",
            },
            dtypes={
                "weights": dtype_name(next(p.dtype for p in experts.parameters() if p.ndim == 3)),
                "kv_cache": "none",  # the op has none
            },
            width=geometry.hidden_size,
            notes=(
                "experts write to a buffer of their own, where the engine's write over their input",
            ),
        )

    return MoeMock(
        plan,
        geometry,
        Build(
            (path,),
            about,
            overrides=from_the_first(stored),
            layer=layout.first_dense,
            functions=_FUNCTIONS,
        ),
    )


def _fuses(experts: Any) -> bool:
    """Whether the engine has put shared experts among the routed ones."""
    return bool(getattr(experts, "num_fused_shared_experts", 0))
