"""The MoE mock of TensorRT-LLM: the ``experts`` module, from router logits to combine.

The router's product and shared experts lie outside it. Routing is driven by the module's inputs:
hidden states from which the layer's own gate makes logits that pick the wanted experts.

Source: NVIDIA/TensorRT-LLM, ``_torch/moe/fused_moe/interface.py`` at 1f41a4c (``MoE.forward``),
``_torch/modules/fused_moe/create_moe.py`` at 01f8de5. Not run.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.trtllm import probe
from opkit.layers.backends.trtllm.layer import Call, Seam, module_of, seams_of
from opkit.layers.backends.trtllm.mock import About, Build, TrtllmMock
from opkit.layers.backends.trtllm.worker import LayerWorker
from opkit.layers.geometry import Experts, read_geometry
from opkit.layers.model_config import read_config
from opkit.layers.moe import MOE, from_the_first
from opkit.layers.moe.routing import driven_states
from opkit.layers.op import MoeCase
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

probe.root()  # an ImportError here says that the backend is not installed


class MoeMock(TrtllmMock):
    """See :class:`opkit.layers.mock.Mock`; also runs steps whose routing is driven."""

    def feed(self, case: Any, calls: Sequence[Call]) -> None:
        """See :meth:`opkit.layers.backends.trtllm.mock.TrtllmMock.feed`."""
        if not isinstance(case, MoeCase):
            super().feed(case, calls)
            return
        (call,) = calls
        arguments = call.bound.arguments
        unknown = {"x", "router_logits"} - set(arguments)
        if unknown:
            raise self.upstream.drift(
                f"{type(call.target).__name__}.forward was called without {', '.join(unknown)}"
            )
        self._steer(case, call)

    def _steer(self, case: MoeCase, call: Call) -> None:
        torch = importlib.import_module("torch")
        experts = self.worker.geometry.experts
        assert experts is not None
        path = call.seam.path.rpartition(".")[0]
        gate = module_of(self.upstream, self.worker.layer, Seam(f"{path}.gate"))
        hidden = call.bound.arguments["x"]
        steered = driven_states(case, experts, gate, self.plan.seed, hidden.dtype, torch)
        hidden.copy_(steered)
        with self.worker.engine_context():
            call.replace("router_logits", gate(hidden))


def _about(worker: LayerWorker, model: Experts, seam: Seam) -> About:
    experts = module_of(worker.upstream, worker.layer, seam)
    weights = [value.dtype for value in experts.parameters() if value.ndim == 3]
    if not weights:
        raise worker.upstream.drift(f"{type(experts).__name__} has no weights of experts")
    return About(
        model={
            "inter_size": model.intermediate_size,
            "topk": model.topk,
            "num_experts": model.number,
            "includes": "",
            "kernels": type(getattr(experts, "backend", experts)).__name__,
        },
        dtypes={"weights": dtype_name(weights[0])},
        width=worker.geometry.hidden_size,
    )


def build(plan: Plan) -> MoeMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no experts.
        ToolMissing: no GPU, or a TensorRT-LLM that opkit does not know.
    """
    geometry = read_geometry(plan.model)
    model = geometry.experts
    if model is None:
        raise BadInput(f"{plan.model}: no experts in this model", "its MLP is the op gemm's")
    seams = seams_of("moe", geometry.architecture)

    def about(worker: LayerWorker, calls: Sequence[Call]) -> About:
        del calls
        return _about(worker, model, seams[0])

    return MoeMock(
        plan,
        MOE,
        Build(
            seams,
            about,
            overrides=from_the_first(read_config(plan.model)[0]),
            cached=False,
        ),
    )
