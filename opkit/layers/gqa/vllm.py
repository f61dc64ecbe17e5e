"""The GQA mock of vLLM: its ``Attention`` layer, out of the engine's own decoder layer.

Source: vLLM 0.24.0, ``model_executor/layers/attention/attention.py``; queries, keys and values come
from the engine's own projections, norms and rope before it.
"""

from __future__ import annotations

from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.vllm.config import model_json
from opkit.layers.backends.vllm.mock import About, Build, VllmMock
from opkit.layers.backends.vllm.models import OneLayerModel
from opkit.layers.gqa import GQA
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

_PATH = "self_attn.attn"


def _about(model: OneLayerModel, shape: Any) -> About:
    del shape  # the layer knows what of it is this rank's
    attention = model.ops()[_PATH]
    stored, setting = dtype_name(attention.kv_cache.dtype), attention.kv_cache_dtype
    return About(
        model={
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_kv_heads,
            "head_dim": attention.head_size,
            "window_size": attention.sliding_window or 0,
        },
        dtypes={
            "weights": "none",  # the op has none
            "kv_cache": stored if setting == "auto" else setting,
        },
        width=attention.num_heads * attention.head_size,
    )


def build(plan: Plan) -> VllmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model's attention is another.
    """
    if "kv_lora_rank" in model_json(plan.model):
        raise BadInput(f"{plan.model}: this model has latent attention", "try the ops mla and dsa")
    return VllmMock(plan, GQA, Build((_PATH,), _about))
