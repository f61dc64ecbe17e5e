"""Grouped-query attention: the attention core of Llama and Qwen layers, heads sharing keys.

Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023. The op is
what the field's attention tables hold: the cache write and the attention itself, between rope and
output projection; the linear layers around it are ``gemm``.
"""

from __future__ import annotations

from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, Op, Phase, RegionPattern, Table

# The engine's attention layer inside self_attn.
_CORE = r"layers\.(?P<layer>\d+)\.self_attn\.attn$"
_COLUMNS = (
    "batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size",
    "beam_width", "attn_dtype", "kv_cache_dtype", "step",
)  # fmt: skip
_CACHE_TYPES = {"fp8_e4m3": "fp8", "float8_e4m3fn": "fp8"}


def columns(case: Case, mock: Manifest) -> dict[str, str | int]:
    """The row's own columns; head counts are rank-local, ``step`` the tokens cached before."""
    cache = mock.dtypes["kv_cache"]
    return {
        "batch_size": case.batch,
        "isl": case.tokens,
        "num_heads": int(mock.model["num_heads"]),
        "num_key_value_heads": int(mock.model["num_kv_heads"]),
        "head_dim": int(mock.model["head_dim"]),
        "window_size": int(mock.model["window_size"]),
        "beam_width": 1,
        "attn_dtype": mock.dtypes["activations"],
        "kv_cache_dtype": _CACHE_TYPES.get(cache, cache),
        "step": case.past,
    }


def work(case: Case, mock: Manifest) -> tuple[float, float]:
    """Floating-point operations of the causal products, and bytes of one read of the cache."""
    heads, size = int(mock.model["num_heads"]), int(mock.model["head_dim"])
    seen = case.tokens * case.past + case.tokens * (case.tokens + 1) // 2
    window = int(mock.model["window_size"])
    if window:
        seen = sum(min(window, case.past + token + 1) for token in range(case.tokens))
    width = 1 if _CACHE_TYPES.get(mock.dtypes["kv_cache"]) == "fp8" else 2
    cached = min(case.past, window) if window else case.past
    entries = case.batch * cached * 2 * int(mock.model["num_kv_heads"]) * size
    return 4.0 * case.batch * seen * heads * size, float(entries * width)


GQA = Op(
    name="gqa",
    title="Grouped-query attention: cache write and attention",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={
        # Rope before it, the output projection after it: borders are learned from module ranges.
        "vllm": RegionPattern(_CORE),
        "sglang": RegionPattern(_CORE),
        "trtllm": RegionPattern(_CORE),
    },
    tables={
        phase: Table(
            f"{phase}_attention",
            "attention",
            _COLUMNS,
            {
                "vllm": "vllm_flash_attn_fa3",
                "sglang": "fa3",
                "trtllm": "torch_flow",
                "torch": "torch",
            },
        )
        for phase in (Phase.CONTEXT, Phase.GENERATION)
    },
    columns=columns,
    work=work,
    shares=("num_attention_heads", "num_key_value_heads", "head_dim"),
)
