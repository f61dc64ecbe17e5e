"""The GQA mock of TensorRT-LLM: its attention, from the fused projection's output on.

The seam is ``Attention.forward_impl``: between the projections, with rope where TensorRT-LLM fuses
it into the attention kernel (it does by default), the cache write and the attention. It is no
module of its own, so no module range delimits it in a trace.

Source: NVIDIA/TensorRT-LLM, ``_torch/modules/attention.py`` at 00547a2 and
``_torch/attention/attention.py`` at 930bd1a. Not run.
"""

from __future__ import annotations

from collections.abc import Sequence

from opkit.errors import BadInput
from opkit.layers.backends.trtllm import probe
from opkit.layers.backends.trtllm.layer import Call, seams_of
from opkit.layers.backends.trtllm.mock import (
    About,
    Build,
    TrtllmMock,
    require_attention,
)
from opkit.layers.backends.trtllm.worker import LayerWorker
from opkit.layers.geometry import read_geometry
from opkit.layers.gqa import GQA
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

probe.root()  # an ImportError here says that the backend is not installed


def _about(worker: LayerWorker, calls: Sequence[Call]) -> About:
    size = worker.geometry
    # TensorRT-LLM's models decide whether a window is used, whatever config.json says.
    windows = [call.bound.arguments.get("attention_window_size") or 0 for call in calls]
    return About(
        model={
            "num_heads": size.heads,
            "num_kv_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "window_size": max(windows, default=size.sliding_window),
        },
        dtypes={"weights": dtype_name(worker.layer.self_attn.o_proj.weight.dtype)},
        width=size.heads * size.head_dim,
    )


def build(plan: Plan) -> TrtllmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model's attention is latent.
        ToolMissing: no GPU, or a TensorRT-LLM that opkit does not know.
    """
    geometry = read_geometry(plan.model)
    if geometry.latent is not None:
        raise BadInput(f"{plan.model}: its attention is latent", "it is the op mla's or dsa's")
    return TrtllmMock(
        plan,
        GQA,
        Build(
            seams_of("gqa", geometry.architecture),
            _about,
            check=lambda worker: require_attention(worker, ("attn",)),
        ),
    )
