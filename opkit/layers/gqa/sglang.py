"""The GQA mock of SGLang: the ``RadixAttention`` of a decoder layer, in SGLang's own runner.

Source: SGLang 0.5.14, ``layers/radix_attention.py`` and ``layers/attention/``.
"""

from __future__ import annotations

from opkit.errors import BadInput
from opkit.layers.backends.sglang.mock import About, Build, SglangMock
from opkit.layers.backends.sglang.worker import LayerWorker
from opkit.layers.geometry import read_geometry
from opkit.layers.gqa import GQA
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

_PATH = "self_attn.attn"


def _about(worker: LayerWorker) -> About:
    attention = worker.model.ops()[_PATH]
    window = attention.sliding_window_size
    fused = worker.step is not None and not _writes(worker)
    notes = ("the engine's rope writes the cache here, before the op",) if fused else ()
    return About(
        model={
            "num_heads": attention.tp_q_head_num,
            "num_kv_heads": attention.tp_k_head_num,
            "head_dim": attention.head_dim,
            "window_size": max(window or 0, 0),
        },
        dtypes={
            "weights": "none",
            "kv_cache": dtype_name(worker.runner.kv_cache_dtype),
        },
        width=attention.tp_q_head_num * attention.v_head_dim,
        notes=notes,
    )


def _writes(worker: LayerWorker) -> bool:
    """Whether the attention writes the step's keys and values itself."""
    assert worker.step is not None
    return all(call.kwargs.get("save_kv_cache", True) for call in worker.step.calls)


def build(plan: Plan) -> SglangMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model's attention is a latent one.
    """
    if read_geometry(plan.model).latent is not None:
        raise BadInput(f"{plan.model}: latent attention is the op mla or dsa")
    return SglangMock(plan, GQA, Build((_PATH,), _about, ("k_cache", "v_cache")))
