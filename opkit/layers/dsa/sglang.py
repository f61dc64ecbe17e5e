"""The DSA mock of SGLang: ``DeepseekV2AttentionMLA`` with its indexer, in SGLang's own runner.

Source: SGLang 0.5.14, ``models/deepseek_v2.py``, ``layers/attention/dsa_backend.py``. The module is
the engine's own layer's (``DeepseekV32ForCausalLM`` of one layer); everything around it is
:mod:`opkit.layers.backends.sglang.worker`.
"""

from __future__ import annotations

from opkit.errors import BadInput
from opkit.layers.backends.sglang.mock import About, Build, SglangMock
from opkit.layers.backends.sglang.worker import LayerWorker
from opkit.layers.dsa import DSA
from opkit.layers.geometry import read_geometry
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

_GEOMETRY = (
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
LATENT_FUNCTIONS = ("sglang.srt.models.deepseek_common.attention_",)
_FUNCTIONS = (*LATENT_FUNCTIONS, "sglang.srt.layers.attention.dsa.")
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")


def latent(worker: LayerWorker) -> About:
    """What a latent attention tells of itself; also of ``mla``."""
    attention, shape = worker.model.ops()["self_attn"], worker.runner.model_config.hf_config
    return About(
        model={
            "num_heads": attention.num_local_heads,
            **{name: getattr(shape, name) for name in _GEOMETRY},
        },
        dtypes={
            "weights": dtype_name(attention.o_proj.weight.dtype),
            "kv_cache": dtype_name(worker.runner.kv_cache_dtype),
        },
        width=shape.hidden_size,
    )


def _about(worker: LayerWorker) -> About:
    about, shape = latent(worker), worker.runner.model_config.hf_config
    args = worker.args
    about.model |= {name: getattr(shape, name) for name in _INDEXER}
    about.model["prefill_backend"] = str(args.dsa_prefill_backend)  # rows are sorted by them
    about.model["decode_backend"] = str(args.dsa_decode_backend)
    # Stored as bytes: float8 keys of a page, then their float32 scales.
    about.dtypes["indexer_cache"] = "float8_e4m3fn"
    about.notes = (
        f"prefill {args.dsa_prefill_backend}, decode {args.dsa_decode_backend}, top-k "
        f"{args.dsa_topk_backend}; eager prefill of sequences up to {shape.index_topk:,} tokens "
        "is dense (MHA_ONE_SHOT)",
    )
    return about


def build(plan: Plan) -> SglangMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no indexer.
    """
    if read_geometry(plan.model).indexer is None:
        raise BadInput(f"{plan.model}: a model without an indexer has no dsa", "use the op mla")
    caches = ("kv_cache", "indexer_cache")
    return SglangMock(plan, DSA, Build(("self_attn",), _about, caches, functions=_FUNCTIONS))
