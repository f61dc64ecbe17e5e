"""Checkpoints of models small enough for a test, and a reader of what was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from opkit.layers.checkpoint import Checkpoint, bundled_models, plan_checkpoint

# Of each kind the smallest that has all its parts.
SMALL: dict[str, dict[str, Any]] = {
    "deepseek-v32": {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "index_n_heads": 2,
        "index_head_dim": 16, "n_routed_experts": 16, "vocab_size": 128, "num_hidden_layers": 3,
    },
    "qwen3": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "num_hidden_layers": 2,
    },
    "qwen3-moe": {
        "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 128,
    },
    "mixtral": {
        "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 128,
        "num_key_value_heads": 2, "num_hidden_layers": 1,
    },
    "llama": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128},
}  # fmt: skip


def small(name: str, **changes: Any) -> dict[str, Any]:
    return bundled_models()[name] | SMALL[name] | changes


def plan(name: str, layers: int | None = None, **changes: Any) -> Checkpoint:
    return plan_checkpoint(small(name, **changes), f"{name}.json", layers)


def shapes(found: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {item.name: item.shape for item in found.weights()}


def read(folder: Path) -> dict[str, tuple[str, Any]]:
    """All tensors of a folder: dtype, and values as float32, by the format's description."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, tuple[str, Any]] = {}
    for name in sorted(set(index["weight_map"].values())):
        data = (folder / name).read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        assert begin % 8 == 0
        header = json.loads(data[8:begin])
        assert header.pop("__metadata__") == {"format": "pt"}
        for tensor, item in header.items():
            assert index["weight_map"][tensor] == name
            first, last = item["data_offsets"]
            raw = data[begin + first : begin + last]
            if item["dtype"] == "BF16":
                values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[item["dtype"]])
            found[tensor] = item["dtype"], values.reshape(item["shape"]).astype(np.float32)
        assert begin + max(item["data_offsets"][1] for item in header.values()) == len(data)
    return found
