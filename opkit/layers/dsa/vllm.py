"""The DSA mock of vLLM: ``DeepseekV2MLAAttention`` with its indexer, in vLLM's own worker.

Source: vLLM 0.24.0, ``model_executor/models/deepseek_v2.py``. The module is built and called as
``DeepseekV2DecoderLayer`` and ``DeepseekV2Model`` build and call it; everything around it is
:mod:`opkit.layers.backends.vllm`. A server that loads a checkpoint is mocked by the module of its
own decoder layer, which knows how to load it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLAAttention
from vllm.platforms import current_platform

from opkit.layers.backends.vllm.mock import About, Build, VllmMock
from opkit.layers.backends.vllm.models import OneLayerModel
from opkit.layers.dsa import DSA
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

_PATH = "self_attn"
_GEOMETRY = (
    "hidden_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim",
)  # fmt: skip
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")


def topk_buffer(vllm_config: Any) -> Any:
    """The model-wide buffer of picked token indices, [max_num_batched_tokens, index_topk] int32."""
    return torch.empty(
        vllm_config.scheduler_config.max_num_batched_tokens,
        vllm_config.model_config.hf_config.index_topk,
        dtype=torch.int32,
        device=current_platform.device_type,
    )


class DsaLayer(OneLayerModel):
    """Embedding, input norm, and the attention module with its indexer."""

    # What DeepseekV2ForCausalLM tells quantisation methods about its fused projections.
    packed_modules_mapping = {  # noqa: RUF012  # vLLM reads it off the class
        "gate_up_proj": ["gate_proj", "up_proj"],
        "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
    }

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        shape = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            shape.vocab_size,
            shape.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix="model.embed_tokens",
        )
        self.self_attn = DeepseekV2MLAAttention(
            vllm_config=vllm_config,
            config=shape,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_attention_heads,
            qk_nope_head_dim=shape.qk_nope_head_dim,
            qk_rope_head_dim=shape.qk_rope_head_dim,
            v_head_dim=shape.v_head_dim,
            q_lora_rank=shape.q_lora_rank,
            kv_lora_rank=shape.kv_lora_rank,
            max_position_embeddings=shape.max_position_embeddings,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"model.layers.0.{_PATH}",
            topk_indices_buffer=topk_buffer(vllm_config),
        )
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def ops(self) -> dict[str, Any]:
        """The attention module."""
        return {_PATH: self.self_attn}

    def arguments(self, input_ids: Any, positions: Any) -> dict[str, Any]:
        """As ``DeepseekV2DecoderLayer.forward`` calls its attention: after embedding and norm."""
        hidden = self.input_layernorm(self.embed_tokens(input_ids))
        return {
            f"{_PATH}/positions": positions,
            f"{_PATH}/hidden_states": self.pin(f"{_PATH}/hidden_states", hidden),
            f"{_PATH}/llama_4_scaling": None,
        }


def latent_about(model: OneLayerModel, shape: Any) -> About:
    """Model and dtypes of a latent attention module, for its manifest."""
    module = model.ops()[_PATH]
    attention = module.mla_attn.mla_attn
    stored = dtype_name(attention.kv_cache.dtype)
    setting = attention.kv_cache_dtype
    return About(
        model={
            "num_heads": shape.num_attention_heads,
            **{name: getattr(shape, name) for name in _GEOMETRY},
        },
        dtypes={
            "weights": dtype_name(module.o_proj.weight.dtype),
            # vLLM's name for the cache's format, or the stored type where that is "auto".
            "kv_cache": stored if setting == "auto" else setting,
        },
        width=shape.hidden_size,
    )


def _about(model: OneLayerModel, shape: Any) -> About:
    indexer = model.ops()[_PATH].mla_attn.indexer
    found = latent_about(model, shape)
    found.model.update({name: getattr(shape, name) for name in _INDEXER})
    found.dtypes["indexer_cache"] = dtype_name(indexer.k_cache.kv_cache.dtype)
    return found


def build(plan: Plan) -> VllmMock:
    """The mock that ``plan`` asks for; with ``plan.strict``, out of the engine's decoder layer."""
    indexer = {"indexer.indexer_op": {"q": 1, "k": 2, "weights": 3}}
    return VllmMock(plan, DSA, Build((_PATH,), _about, own=DsaLayer, watched=indexer))
