"""The DSA mock of vLLM: ``DeepseekV2MLAAttention`` with its indexer, in vLLM's own worker.

Source: vLLM 0.24.0, ``model_executor/models/deepseek_v2.py``. The module is built and called as
``DeepseekV2DecoderLayer`` and ``DeepseekV2Model`` build and call it; everything around it is
:mod:`opkit.layers.vllm_worker`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.config import CompilationMode
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.deepseek_v2 import (
    DeepseekV2DecoderLayer,
    DeepseekV2MLAAttention,
)
from vllm.platforms import current_platform

from opkit.layers import prompts
from opkit.layers import vllm_config as configuration
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.op import Case, LaunchMode
from opkit.layers.operands import watch
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import base_versions, file_digest, source_digests
from opkit.layers.vllm_config import model_json
from opkit.layers.vllm_worker import LayerWorker, OneLayerModel

_PREFIX = "model.layers.0"
_GEOMETRY = (
    "hidden_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "index_n_heads", "index_head_dim", "index_topk",
)  # fmt: skip


_CACHE_RECIPES = {
    "prefilled": "the same prompts prefilled through this module, one request a step, at most "
    "{limit:,} tokens a step",
    "pooled": "one long prompt prefilled through this module, its blocks repeated over the cache",
}
_LIMIT_RECIPES = {
    "server": "the server's own",
    "cases": "lengths, requests and tokens a step raised to what the cases need; a graph for each "
    "batch",
}


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
            prefix=f"{_PREFIX}.self_attn",
            topk_indices_buffer=topk_buffer(vllm_config),
        )
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def module(self) -> Any:
        """The attention module."""
        return self.self_attn

    def norm(self, embedded: Any) -> Any:
        """The layer's input norm."""
        return self.input_layernorm(embedded)

    def arguments(self, positions: Any, hidden: Any) -> dict[str, Any]:
        """As ``DeepseekV2DecoderLayer.forward`` calls its attention."""
        return {"positions": positions, "hidden_states": hidden, "llama_4_scaling": None}


class StrictDsaLayer(DsaLayer):
    """The same, with module and norm taken out of the engine's own decoder layer."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        OneLayerModel.__init__(self, vllm_config=vllm_config, prefix=prefix)
        layer = DeepseekV2DecoderLayer(
            vllm_config=vllm_config, prefix=_PREFIX, topk_indices_buffer=topk_buffer(vllm_config)
        )
        self.self_attn = layer.self_attn
        self.input_layernorm = layer.input_layernorm


class DsaMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.worker = LayerWorker(plan, StrictDsaLayer if plan.strict else DsaLayer)

    def prepare(self, planned: PlannedCase[Case]) -> Callable[[], None]:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        return self.worker.prepare(planned)

    def operands(self, planned: PlannedCase[Case]) -> tuple[Operand, ...]:
        """Large GEMMs of the module, and what the indexer's top-k works on.

        Runs eagerly, whatever the case's mode: a replayed graph calls no module.
        """
        forward = self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        indexer = {"indexer.indexer_op": {"q": 1, "k": 2, "weights": 3}}
        return watch(self.worker.model.module(), forward, planned.case.phase, indexer)

    def describe(self) -> Manifest:
        """Versions, shapes, dtypes, sources and the recipe of inputs."""
        shape = self.worker.config.model_config.hf_config
        stored = model_json(self.plan.model)
        attention = self.worker.model.module().mla_attn
        cache, indexer = attention.mla_attn, attention.indexer
        return Manifest(
            side="mock",
            op=self.plan.op,
            backend=self.plan.backend,
            command=tuple(sys.argv),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={**base_versions(), **_versions()},
            model={
                "architecture": shape.architectures[0],
                "num_heads": shape.num_attention_heads,
                **{name: getattr(shape, name) for name in _GEOMETRY},
                "num_hidden_layers": stored["num_hidden_layers"],
                "config_sha256": file_digest(Path(self.plan.model) / "config.json"),
            },
            dtypes={
                "weights": _dtype(attention.o_proj.weight.dtype),
                "activations": _dtype(self.worker.config.model_config.dtype),
                "kv_cache": _cache_dtype(cache.kv_cache_dtype, cache.kv_cache.dtype),
                "indexer_cache": _dtype(indexer.k_cache.kv_cache.dtype),
            },
            tp_size=self.plan.tp_size,
            engine_args=self.plan.engine_args,
            layer_source=self._sources(),
            recipe=self._recipe(),
            notes=self._notes(),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self.worker.close()

    def _sources(self) -> dict[str, str]:
        """Digests of every vLLM file that the layer is made of, and of opkit's mock."""
        classes = {type(part) for part in self.worker.model.module().modules()}
        classes |= {type(self.worker.model), type(self.worker)}
        classes.add(type(self.worker.model.module().mla_attn.mla_attn.impl))
        for group in self.worker.runner._attn_group_iterator():
            classes |= {group.backend, type(group.get_metadata_builder())}
        # Not only classes make the layer: its limits and its tokens come out of functions.
        functions = {
            f"opkit/layers/{path.name}": file_digest(path)
            for path in (Path(str(module.__file__)) for module in (configuration, prompts))
        }
        return source_digests(classes, ("vllm", "opkit")) | functions

    def _recipe(self) -> dict[str, str]:
        """How weights, activations and caches came to their values."""
        limit = self.worker.config.scheduler_config.max_num_batched_tokens
        return {
            "weights": "vLLM's dummy weights: uniform in ±1e-3, seed 1234 for every parameter",
            "activations": f"prompt_tokens(seed={self.plan.seed}, request 0 to batch-1), "
            "through embed_tokens and input_layernorm of layer 0",
            "kv_cache": _CACHE_RECIPES[self.plan.caches].format(limit=limit),
            "limits": _LIMIT_RECIPES[self.plan.limits],
            "kv_cache_blocks": "consecutive blocks of a fresh pool, request after request",
        }

    def _notes(self) -> tuple[str, ...]:
        """In what this mock knowingly differs from the server."""
        notes = []
        if self.plan.tp_size > 1:
            notes.append(
                f"tensor parallelism of {self.plan.tp_size} simulated: one rank's heads, no "
                "all-reduce after o_proj"
            )
        mode = self.worker.config.compilation_config.mode
        if mode != CompilationMode.NONE:
            notes.append(f"the server compiles its model (mode {mode}), the mock does not")
        if self.worker.args.load_format != "dummy":
            notes.append(
                f"the server loads weights ({self.worker.args.load_format}), the mock draws them"
            )
        if self.plan.strict:
            notes.append("module taken from the engine's own DeepseekV2DecoderLayer")
        return tuple(notes)


def build(plan: Plan) -> DsaMock:
    """Build the mock that ``plan`` asks for; see :class:`DsaMock`."""
    return DsaMock(plan)


def _versions() -> dict[str, str]:
    """Versions of the framework, CUDA and the driver, and the GPU's name."""
    from vllm.third_party import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "driver": driver.decode() if isinstance(driver, bytes) else driver,
        "gpu": torch.cuda.get_device_name(0),
    }


def _dtype(dtype: Any) -> str:
    """As torch writes it, without the ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")


def _cache_dtype(setting: str, stored: Any) -> str:
    """The KV cache's format: vLLM's name for it, or the stored type where that is ``auto``."""
    return _dtype(stored) if setting == "auto" else setting
