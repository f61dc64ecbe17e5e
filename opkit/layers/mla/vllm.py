"""The MLA mock of vLLM: ``DeepseekV2MLAAttention`` without indexer, out of the engine's own layer.

Source: vLLM 0.24.0, ``model_executor/models/deepseek_v2.py``.
"""

from __future__ import annotations

from opkit.errors import BadInput
from opkit.layers.backends.vllm.config import model_json
from opkit.layers.backends.vllm.mock import Build, VllmMock
from opkit.layers.dsa.vllm import latent_about
from opkit.layers.mla import MLA
from opkit.layers.plan import Plan


def build(plan: Plan) -> VllmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model's attention is another.
    """
    shape = model_json(plan.model)
    if "kv_lora_rank" not in shape:
        raise BadInput(f"{plan.model}: no latent attention in this model", "try the op gqa")
    if "index_topk" in shape:
        raise BadInput(f"{plan.model}: this model has an indexer", "that is the op dsa")
    return VllmMock(plan, MLA, Build(("self_attn",), latent_about))
