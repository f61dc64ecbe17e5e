"""DeepSeek sparse attention (DSA): MLA over the tokens that a lightning indexer picks.

Source: DeepSeek-V3.2-Exp technical report (2025); in the engines it is the ``self_attn`` module of
``DeepseekV32ForCausalLM``. The op is that whole module: projections, norms, rope, indexer, top-k,
cache writes, sparse attention, output projection.
"""

from __future__ import annotations

from opkit.layers.op import Op, Phase, RegionPattern

_SELF_ATTENTION = r"layers\.(?P<layer>\d+)\.self_attn$"

DSA = Op(
    name="dsa",
    title="DeepSeek sparse attention: MLA with the lightning indexer",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={
        # Before it the input norm, after it the norm before the MLP: both add the residual. The
        # first of the model does not, but plain norms run inside the op too: no border.
        "vllm": RegionPattern(_SELF_ATTENTION, (r"fused_add_rms_norm",)),
        # flashinfer's norm kernels in both; TensorRT-LLM also has its own.
        "sglang": RegionPattern(_SELF_ATTENTION, (r"FusedAddRMSNormKernel",)),
        "trtllm": RegionPattern(_SELF_ATTENTION, (r"(?i)fused_?add_?rms_?norm",)),
    },
    data_dependent=(
        r"(?i)topk_?per_?row",  # topKPerRowPrefill, topKPerRowDecode
        r"(?i)(cooperative|persistent|radix|indexer)_?topk",
        r"(?i)topk_transform",  # SGLang
        r"(?i)sparse_attn",  # FlashMLA's prefill kernel: gathers the picked tokens
        r"flash_fwd_splitkv_mla.*sparse",  # FlashMLA's decode kernel over an FP8 cache
    ),
)
