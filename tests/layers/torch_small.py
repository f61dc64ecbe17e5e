"""Small models, plans and steps for the tests of the torch backend."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from opkit.layers.op import AnyCase, Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase

_COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "vocab_size": 500,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
DEEPSEEK = _COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "first_k_dense_replace": 1,
}
SPARSE = DEEPSEEK | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 6,
    "index_head_dim": 16,
    "index_topk": 5,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LLAMA = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


def context(batch: int, tokens: int, past: int = 0) -> Case:
    return Case(Phase.CONTEXT, batch, tokens, past)


def generation(batch: int, past: int) -> Case:
    return Case(Phase.GENERATION, batch, 1, past)


def plan(folder: Path, op: str, config: dict[str, Any], *cases: AnyCase, **more: Any) -> Plan:
    """A plan of eager cases for a model whose config.json is written into ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    planned = tuple(PlannedCase(case, LaunchMode.EAGER) for case in cases)
    return Plan(op, "torch", str(folder), planned, "mock.json", **more)


def build(made: Plan, dtype: str | None = "float64") -> Any:
    return importlib.import_module(f"opkit.layers.{made.op}.torch").build(made, dtype)


def run(mock: Any, case: AnyCase) -> Any:
    """The output of one eager forward of ``case``."""
    return mock.prepare(PlannedCase(case, LaunchMode.EAGER))()
