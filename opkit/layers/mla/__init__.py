"""Multi-head latent attention (MLA): DeepSeek-V3's ``self_attn`` module, without an indexer.

Source: DeepSeek-V3 technical report (2024). The op is the whole module: projections, norms, rope,
cache write, attention over the latent cache, output projection.
"""

from __future__ import annotations

from opkit.layers.dsa import COLUMNS, SELF_ATTENTION, columns, projections
from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, Op, Phase, RegionPattern, Table


def work(case: Case, mock: Manifest) -> tuple[float, float]:
    """Least floating-point operations and bytes of one forward.

    Counted are the large projections, attention in the cheaper of its two forms (per head in
    context, absorbed into the latent in generation: never less than per head), and one read of the
    weights and of the cache.
    """
    size = {name: int(value) for name, value in mock.model.items() if isinstance(value, int)}
    weights = projections(size)
    tokens = case.batch * case.tokens
    seen = case.tokens * case.past + case.tokens * (case.tokens + 1) // 2
    a_head = size["qk_nope_head_dim"] + size["qk_rope_head_dim"] + size["v_head_dim"]
    attention = 2 * case.batch * seen * size["num_heads"] * a_head
    width = 1 if "float8" in mock.dtypes["weights"] else 2  # bytes of a weight
    entry = size["kv_lora_rank"] + size["qk_rope_head_dim"]
    cached = case.batch * case.past * entry * (1 if "fp8" in mock.dtypes["kv_cache"] else 2)
    return 2.0 * tokens * weights + attention, float(weights * width + cached)


MLA = Op(
    name="mla",
    title="DeepSeek multi-head latent attention",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={
        "vllm": RegionPattern(SELF_ATTENTION, (r"fused_add_rms_norm",)),
        "sglang": RegionPattern(SELF_ATTENTION, (r"FusedAddRMSNormKernel",)),
        "trtllm": RegionPattern(SELF_ATTENTION, (r"(?i)fused_?add_?rms_?norm",)),
    },
    tables={
        phase: Table(
            f"mla_{phase}_module",
            "mla",
            COLUMNS,
            {
                "vllm": "FLASH_ATTN_MLA",
                "trtllm": "default",
                "sglang": "flash_attention",
                "torch": "torch",
            },
        )
        for phase in (Phase.CONTEXT, Phase.GENERATION)
    },
    columns=columns,
    work=work,
)
