"""The MLA mock of TensorRT-LLM: ``self_attn`` of its DeepSeek-V3 layer.

Source: NVIDIA/TensorRT-LLM, ``_torch/models/modeling_deepseekv3.py`` at 1f41a4c,
``_torch/attention/mla.py`` at 047098b. Not run.
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
    latent_sizes,
    require_attention,
)
from opkit.layers.backends.trtllm.worker import LayerWorker, require_gpu, sm_version
from opkit.layers.geometry import read_geometry
from opkit.layers.mla import MLA
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

probe.root()  # an ImportError here says that the backend is not installed

_LEAST_SM = 90  # no latent attention kernels for context before Hopper (attentionOp.cpp)


def _about(worker: LayerWorker, calls: Sequence[Call]) -> About:
    del calls
    return About(
        model=latent_sizes(worker),
        dtypes={"weights": dtype_name(worker.layer.self_attn.o_proj.weight.dtype)},
        width=worker.geometry.hidden_size,
    )


def build(plan: Plan) -> TrtllmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no latent attention, or an indexer, or the GPU is older than Hopper.
        ToolMissing: no GPU, or a TensorRT-LLM that opkit does not know.
    """
    geometry = read_geometry(plan.model)
    if geometry.latent is None:
        raise BadInput(f"{plan.model}: no latent attention", "its attention is the op gqa's")
    if geometry.indexer is not None:
        raise BadInput(f"{plan.model}: its attention has an indexer", "it is the op dsa's")
    found = sm_version(require_gpu())
    if found < _LEAST_SM:
        raise BadInput(
            f"TensorRT-LLM has latent attention from SM{_LEAST_SM}; this GPU is SM{found}"
        )
    return TrtllmMock(
        plan,
        MLA,
        Build(
            seams_of("mla", geometry.architecture),
            _about,
            check=lambda worker: require_attention(worker, ("mqa", "mha")),
        ),
    )
