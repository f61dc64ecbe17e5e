"""DeepSeek sparse attention (DSA): MLA over the tokens that a lightning indexer picks.

Source: DeepSeek-V3.2-Exp technical report (2025); in the engines it is the ``self_attn`` module of
``DeepseekV32ForCausalLM``. The op is that whole module: projections, norms, rope, indexer, top-k,
cache writes, sparse attention, output projection.
"""

from __future__ import annotations

from collections.abc import Mapping

from opkit.layers.manifest import Manifest
from opkit.layers.op import Case, Op, Phase, RegionPattern, Table

SELF_ATTENTION = r"layers\.(?P<layer>\d+)\.self_attn$"

COLUMNS = (
    "model", "architecture", "mla_dtype", "kv_cache_dtype", "gemm_type", "num_heads", "batch_size",
    "isl", "tp_size", "step",
)  # fmt: skip
# SGLang's rows tell theirs themselves: see _sglang_source.
_KERNEL_SOURCE = {"vllm": "FLASHMLA_SPARSE", "trtllm": "default", "torch": "torch"}
# The model that the field's tables name for an architecture.
_MODELS = {
    "DeepseekV32ForCausalLM": "deepseek-ai/DeepSeek-V3.2",
    "GlmMoeDsaForCausalLM": "zai-org/GLM-5",
}
# How the field's tables spell element types.
_GEMM_TYPES = {"float8_e4m3fn": "fp8_block"}
_SGLANG_CHUNK = 128 * 1024  # tokens: ForwardBatch.get_max_chunk_capacity's default
_CACHE_TYPES = {"fp8_ds_mla": "fp8", "fp8_e4m3": "fp8", "float8_e4m3fn": "fp8"}


def columns(case: Case, mock: Manifest) -> dict[str, str | int]:
    """The row's own columns. ``num_heads`` is rank-local, ``tp_size`` therefore 1."""
    architecture = str(mock.model["architecture"])
    weights, cache = mock.dtypes["weights"], mock.dtypes["kv_cache"]
    own = {}
    if mock.backend == "sglang" and "index_topk" in mock.model:
        own = {"kernel_source": _sglang_source(case, mock)}
    return {
        **own,
        "model": _MODELS.get(architecture, architecture),
        "architecture": architecture,
        "mla_dtype": mock.dtypes["activations"],
        "kv_cache_dtype": _CACHE_TYPES.get(cache, cache),
        "gemm_type": _GEMM_TYPES.get(weights, weights),
        "num_heads": int(mock.model["num_heads"]),
        "batch_size": case.batch,
        "isl": case.tokens,
        "tp_size": 1,
        "step": case.past,
    }


def _sglang_source(case: Case, mock: Manifest) -> str:
    """The bucket of an SGLang row, which is what attends in its step.

    Source: the names in the tables of SGLang 0.5.14 that aiconfigurator 0.12.0 ships for H100 and
    H200; when attention is dense, SGLang 0.5.14, ``layers/attention/dsa_backend.py``
    (``set_dsa_prefill_impl``): every sequence is within what top-k would pick, and all of them fit
    a chunk.
    """
    length = case.past + case.tokens
    short = length <= int(mock.model["index_topk"]) and case.batch * length <= _SGLANG_CHUNK
    if case.phase is Phase.CONTEXT and short:
        return "sglang_dsa_dense_mha_fa3"
    which = "prefill_backend" if case.phase is Phase.CONTEXT else "decode_backend"
    return f"sglang_dsa_indexer_{mock.model[which]}"


def projections(size: Mapping[str, int]) -> int:
    """Elements of the weights of a latent attention's five large projections."""
    heads, hidden = size["num_heads"], size["hidden_size"]
    query = size["qk_nope_head_dim"] + size["qk_rope_head_dim"]
    latent = size["kv_lora_rank"] + size["qk_rope_head_dim"]
    return (
        hidden * (size["q_lora_rank"] + latent)
        + size["q_lora_rank"] * heads * query
        + heads * size["kv_lora_rank"] * (size["qk_nope_head_dim"] + size["v_head_dim"])
        + heads * size["v_head_dim"] * hidden
    )


def work(case: Case, mock: Manifest) -> tuple[float, float]:
    """Least floating-point operations and bytes of one forward.

    Counted are the five large projections, the sparse attention over the picked tokens, and one
    read of the weights; the indexer, caches and activations are left out: it is a lower bound.
    """
    size = {name: int(value) for name, value in mock.model.items() if isinstance(value, int)}
    heads, latent = size["num_heads"], size["kv_lora_rank"] + size["qk_rope_head_dim"]
    weights = projections(size)
    tokens = case.batch * case.tokens
    seen = sum(
        min(size["index_topk"], case.past + token + 1) for token in range(case.tokens)
    )  # tokens that the new tokens of one request attend to
    attention = 2 * case.batch * seen * heads * (latent + size["kv_lora_rank"])
    width = 1 if "float8" in mock.dtypes["weights"] else 2  # bytes of a weight
    return 2.0 * tokens * weights + attention, float(weights * width)


DSA = Op(
    name="dsa",
    title="DeepSeek sparse attention: MLA with the lightning indexer",
    phases=(Phase.CONTEXT, Phase.GENERATION),
    region={
        # Before it the input norm, after it the norm before the MLP: both add the residual. The
        # first of the model does not, but plain norms run inside the op too: no border.
        "vllm": RegionPattern(SELF_ATTENTION, (r"fused_add_rms_norm",)),
        # flashinfer's norm kernels in both; TensorRT-LLM also has its own.
        "sglang": RegionPattern(SELF_ATTENTION, (r"FusedAddRMSNormKernel",)),
        "trtllm": RegionPattern(SELF_ATTENTION, (r"(?i)fused_?add_?rms_?norm",)),
    },
    data_dependent=(
        r"(?i)topk_?per_?row",  # topKPerRowPrefill, topKPerRowDecode
        r"(?i)(cooperative|persistent|radix|indexer)_?topk",
        r"(?i)topk_transform",  # SGLang
        r"(?i)sparse_attn",  # FlashMLA's prefill kernel: gathers the picked tokens
        r"flash_fwd_splitkv_mla.*sparse",  # FlashMLA's decode kernel over an FP8 cache
    ),
    tables={
        phase: Table(f"dsa_{phase}_module", "sparse_attention", COLUMNS, _KERNEL_SOURCE)
        for phase in (Phase.CONTEXT, Phase.GENERATION)
    },
    columns=columns,
    work=work,
)
