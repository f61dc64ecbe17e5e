"""The DSA mock of TensorRT-LLM: ``self_attn`` of its DeepSeek-V3.2 layer, with indexer and top-k.

Source: NVIDIA/TensorRT-LLM, ``_torch/attention_backend/sparse/dsa.py`` at 00e3c1a and
``_torch/attention/backends/sparse/dsa/`` at 186080b. Not run.
"""

from __future__ import annotations

from collections.abc import Sequence

from opkit.errors import BadInput
from opkit.layers.backends.trtllm import probe
from opkit.layers.backends.trtllm.layer import Call, seams_of
from opkit.layers.backends.trtllm.mock import (
    About,
    Build,
    TrtllmMock,
    latent_sizes,
    require_attention,
)
from opkit.layers.backends.trtllm.worker import LayerWorker, require_gpu, sm_version
from opkit.layers.dsa import DSA
from opkit.layers.geometry import read_geometry
from opkit.layers.operands import dtype_name
from opkit.layers.plan import Plan

probe.root()  # an ImportError here says that the backend is not installed

# The indexer's kernels exist for Hopper and for Blackwell of data centres (B200, B300).
_SM = (90, 100, 103)


def _about(worker: LayerWorker, calls: Sequence[Call]) -> About:
    del calls
    indexer = worker.geometry.indexer
    assert indexer is not None
    return About(
        model={
            **latent_sizes(worker),
            "index_n_heads": indexer.heads,
            "index_head_dim": indexer.head_dim,
            "index_topk": indexer.topk,
        },
        dtypes={
            "weights": dtype_name(worker.layer.self_attn.o_proj.weight.dtype),
            "indexer_cache": dtype_name(worker.cache.tensors()["indexer_cache"].dtype),
        },
        width=worker.geometry.hidden_size,
    )


def _check(worker: LayerWorker) -> None:
    """Refuse a layer without sparse attention, and caches without kernels."""
    if worker.cache.sparse is None:
        raise worker.upstream.drift("made no sparse attention configuration from config.json")
    require_attention(worker, ("mqa", "mha"))
    if worker.cache.quantised() and sm_version(worker.torch) < _SM[1]:
        raise BadInput(
            f"DSA with a KV cache of {worker.cache.quantised()} needs a Blackwell GPU (SM100)",
            "its FlashMLA kernels on Hopper take bfloat16 only: set kv_cache_config.dtype to auto",
        )


def build(plan: Plan) -> TrtllmMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no indexer, or this GPU has no kernels for it.
        ToolMissing: no GPU, or a TensorRT-LLM that opkit does not know.
    """
    geometry = read_geometry(plan.model)
    if geometry.indexer is None:
        raise BadInput(f"{plan.model}: no indexer in this model", "its attention is the op mla's")
    found = sm_version(require_gpu())
    if found not in _SM:
        raise BadInput(
            f"TensorRT-LLM has DSA's indexer for SM{', SM'.join(map(str, _SM))}; this GPU is "
            f"SM{found}"
        )
    return TrtllmMock(
        plan, DSA, Build(seams_of("dsa", geometry.architecture), _about, check=_check)
    )
