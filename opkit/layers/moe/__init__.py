"""Mixture of experts, from router to combine: the engine's ``experts`` module.

Where an engine keeps the router's product or shared experts inside that module (vLLM 0.24 does for
Qwen3-MoE and DeepSeek, not for Mixtral), they are part of the op there, and the manifest says so
(``model["includes"]``). Aligned at the engine's steps with the model's own router; collected with
tokens spread over the experts by a stated rule (:mod:`opkit.layers.moe.routing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opkit.layers.manifest import Manifest
from opkit.layers.op import AnyCase, MoeCase, Op, Phase, RegionPattern, Table

_EXPERTS = r"layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts$"
_COLUMNS = (
    "moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size",
    "moe_ep_size", "distribution",
    "module",  # ours: what the time is of; readers pass over a column that they do not know
)  # fmt: skip
_BLOCKS = {"MixtralForCausalLM": "block_sparse_moe"}  # all others call it mlp
# Keys by which a configuration keeps experts out of its first layer, and what puts them there.
_FROM_THE_FIRST = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": []}
# How the field's tables spell element types.
_TYPES = {"float8_e4m3fn": "fp8_block"}


def experts_path(architecture: str) -> str:
    """The experts' module below a decoder layer, in the engines' models of an architecture."""
    return f"{_BLOCKS.get(architecture, 'mlp')}.experts"


def from_the_first(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values for ``config`` that give its first layer experts, wherever the model has its first."""
    return {name: value for name, value in _FROM_THE_FIRST.items() if name in config}


def columns(case: MoeCase, mock: Manifest) -> dict[str, str | int]:
    """The row's own columns; ``inter_size`` is the model's, ``moe_tp_size`` its ranks."""
    weights = mock.dtypes["weights"]
    return {
        "moe_dtype": _TYPES.get(weights, weights),
        "num_tokens": case.tokens,
        "hidden_size": int(mock.model["hidden_size"]),
        "inter_size": int(mock.model["inter_size"]),
        "topk": int(mock.model["topk"]),
        "num_experts": int(mock.model["num_experts"]),
        "moe_tp_size": mock.tp_size,
        "moe_ep_size": 1,
        "distribution": case.routing,
        "module": ", ".join(part for part in ("experts", str(mock.model["includes"])) if part),
    }


def work(case: AnyCase, mock: Manifest) -> tuple[float, float]:
    """Floating-point operations of the experts' three products, and the least bytes of weights.

    Least: at least ``min(topk, tokens * topk)`` experts' weights are read, however tokens fall.
    """
    tokens = case.tokens if isinstance(case, MoeCase) else case.batch * case.tokens  # type: ignore[union-attr]
    topk = int(mock.model["topk"])
    expert = 3 * int(mock.model["hidden_size"]) * int(mock.model["inter_size"]) // mock.tp_size
    width = 1 if "float8" in mock.dtypes["weights"] else 2  # bytes of a weight
    return 2.0 * tokens * topk * expert, float(topk * expert * width)


MOE = Op(
    name="moe",
    title="Mixture of experts, from router to combine",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={
        "vllm": RegionPattern(_EXPERTS),
        "sglang": RegionPattern(_EXPERTS),
        "trtllm": RegionPattern(_EXPERTS),
    },
    # How many experts a step meets, and how evenly, follows from its tokens.
    data_dependent=(
        r"(?i)fused_moe",
        r"(?i)moe_align",
        r"(?i)count_and_sort_expert",
        r"(?i)moe_sum",
    ),
    tables={
        "": Table(
            "moe",
            "moe",
            _COLUMNS,
            # It selects a bucket. bfloat16's; what was launched is in an extra column.
            {
                "vllm": "vllm_unquantizedfusedmoe_triton_tritonexperts",
                "sglang": "sglang_fused_moe_triton",
                "trtllm": "moe_torch_flow",
                "torch": "torch",
            },
        )
    },
    columns=columns,
    work=work,
    shares=("moe_intermediate_size", "intermediate_size"),
    routed=True,
)
