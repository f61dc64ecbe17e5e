"""The engine's KV cache manager and attention metadata, for one layer.

Source: NVIDIA/TensorRT-LLM: ``tools/layer_wise_benchmarks/runner.py`` at 020cbd8,
``_torch/pyexecutor/_util.py`` at 0004396 (managers), ``_torch/pyexecutor/py_executor_creator.py``
at 000429d (block size, runtime features), ``_torch/pyexecutor/model_engine.py`` at 001e670
(metadata).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.trtllm.config import Request, needs, requests_of
from opkit.layers.backends.trtllm.probe import Upstream
from opkit.layers.geometry import Geometry
from opkit.layers.op import Phase
from opkit.layers.plan import Plan

_FLASH_MLA_BLOCK, _BLOCK = 64, 32  # tokens of a KV cache block, with FlashMLA and without


class LayerCache:
    """The KV cache of one layer, and the metadata of steps over it.

    Args:
        upstream: the version that is installed.
        plan: whose cases it must hold.
        geometry: one rank's sizes.
        args: the engine's arguments (``TorchLlmArgs``), resolved.
        model: the engine's model.
        mapping: of one rank.

    Attributes:
        sparse: the model's sparse attention configuration, or None.
        max_tokens: of a step, by the server's options.
        tokens_per_block: of the cache.
        manager: the engine's.

    Raises:
        ToolMissing: this version lacks what opkit uses.
    """

    def __init__(
        self, upstream: Upstream, plan: Plan, geometry: Geometry, args: Any, model: Any,
        mapping: Any,
    ) -> None:  # fmt: skip
        self.upstream, self.plan, self.geometry, self.args = upstream, plan, geometry, args
        self.model, self.mapping = model, mapping
        self.config = model.model_config
        self.sparse = getattr(self.config, "sparse_attention_config", None)
        self.max_tokens = int(args.max_num_tokens)
        self._kept: list[Any] = []
        self._settings = getattr(args, "kv_cache_config", None)
        self.flash = geometry.latent is not None and bool(self.config.enable_flash_mla)
        size = int(getattr(self._settings, "tokens_per_block", None) or _BLOCK)
        self.tokens_per_block = _FLASH_MLA_BLOCK if self.flash else size
        self.manager = self._make()

    @property
    def features(self) -> tuple[bool, bool]:
        """Whether the server reuses blocks, and whether it prefills in chunks."""
        return server_features(self.args)

    def hold(self, requests: Sequence[Request], *, generation: bool) -> None:
        """Free what is held and give these requests blocks for all their tokens.

        Raises:
            BadInput: there is no room for them.
        """
        self.release()
        add = self.manager.add_dummy_requests
        found = add(
            [item.number for item in requests],
            [item.length for item in requests],
            **self.upstream.keywords(
                add,
                must={"is_gen": generation},
                may={"materialize_history": generation},  # blocks for the past: it is written here
            ),
        )
        if not found:
            tokens = sum(item.length for item in requests)
            raise BadInput(
                f"the KV cache manager has no room for {len(requests):,} requests with "
                f"{tokens:,} tokens"
            )
        self._kept = list(found)

    def release(self) -> None:
        """Free the blocks of the requests that are held."""
        for request in self._kept:
            self.manager.free_resources(request)
        self._kept = []

    def blocks(self, batch: int) -> list[list[int]]:
        """Numbers of the blocks of each request that is held."""
        get = self.manager.get_batch_cache_indices
        found = get(list(range(batch)), **self.upstream.keywords(get, may={"layer_idx": 0}))
        return [[int(block) for block in row if int(block) >= 0] for row in found]

    def tensors(self) -> dict[str, Any]:
        """The layer's caches by name; their first dimension counts blocks."""
        found = {"kv_cache": self.manager.get_buffers(0)}
        if self.sparse is not None:
            found["indexer_cache"] = self.manager.get_indexer_k_cache_buffers(0)
        return found

    def repeat_first(self, batch: int, whole: int) -> None:
        """Copy the first request's first ``whole`` blocks over all others that are held, in turn.

        Raises:
            BadInput: there is no whole block to copy.
        """
        if not whole:
            raise BadInput("pooled caches need at least one whole block of cached tokens")
        rows = self.blocks(batch)
        source = rows[0][:whole]
        for cache in self.tensors().values():
            for number, row in enumerate(rows):
                for place, block in enumerate(row):
                    if number or place >= whole:
                        cache[block].copy_(cache[source[place % whole]])

    def quantised(self) -> str:
        """The KV cache's quantisation, as ``FP8``; empty without any."""
        algorithm = getattr(self.config.quant_config, "kv_cache_quant_algo", None)
        name = str(getattr(algorithm, "value", algorithm)).upper()
        return "" if name in ("NONE", "NO_QUANT") else name

    def metadata(self, requests: Sequence[Request], phase: Phase, *, graph: bool) -> Any:
        """Metadata of a step over the requests, of the engine's class, prepared.

        Args:
            requests: of the step, in order; all in ``phase``.
            phase: context or generation.
            graph: whether it is to stand a CUDA graph.
        """
        torch, context = importlib.import_module("torch"), phase is Phase.CONTEXT
        step = {
            "seq_lens": torch.tensor([item.tokens for item in requests], dtype=torch.int),
            "num_contexts": len(requests) if context else 0,
            "request_ids": [item.number for item in requests],
            "prompt_lens": [item.tokens if context else item.past for item in requests],
            "kv_cache_params": self.upstream.call(
                "KVCacheParams",
                must={
                    "use_cache": True,
                    "num_cached_tokens_per_seq": [item.past for item in requests],
                },
            ),
        }
        reuse, chunked = self.features
        # A prefill of what a case has behind it may take several steps whatever the server does.
        chunked = chunked or (context and any(item.past for item in requests))
        features = self.upstream.call(
            "AttentionRuntimeFeatures",
            must={"chunked_prefill": chunked, "cache_reuse": reuse, "chunk_size": self.max_tokens},
        )
        batch, cached = needs(self.plan)["max_batch_size"], reuse or chunked
        heads = self.geometry.heads // self.geometry.kv_heads
        made = self.attention_class().Metadata
        metadata = made(
            **self.upstream.keywords(
                made,
                must={
                    **step,
                    "max_num_requests": batch,
                    "max_num_tokens": self.max_tokens,
                    "kv_cache_manager": self.manager,
                    "mapping": self.mapping,
                    "runtime_features": features,
                    "enable_flash_mla": self.flash,
                },
                may={
                    "max_num_sequences": batch,
                    "num_heads_per_kv": heads,
                    "enable_context_mla_with_cached_kv": self._latent and cached,
                },
                one_of=self._sparse(
                    {"sparse_metadata_params": "to_sparse_metadata_params"},
                    "sparse_attention_config",
                ),
            )
        )
        if graph:
            metadata = metadata.create_cuda_graph_metadata(len(requests))
            for name, value in step.items():
                setattr(metadata, name, value)
        if self.sparse is not None:
            metadata.indexer = self._indexer()
        metadata.prepare()
        return metadata

    def attention_class(self) -> Any:
        """The attention backend that the model's configuration names."""
        choose = self.upstream.get("get_attention_backend")
        names = self._sparse(
            {"sparse_params": "to_sparse_params"}, "sparse_attention_config", "sparse_attn_config"
        )
        return choose(self.config.attn_backend, **self.upstream.keywords(choose, one_of=names))

    @property
    def _latent(self) -> bool:
        return self.geometry.latent is not None

    def _make(self) -> Any:
        """The engine's KV cache manager, with room for the largest case."""
        size, largest = self.tokens_per_block, needs(self.plan)
        longest = -(-(largest["max_seq_len"] + 1) // size) * size
        room = max(
            sum(-(-part.length // size) + 1 for part in requests_of(item.case))
            for item in self.plan.cases
        )
        given = {
            name: getattr(self._settings, name)
            for name in ("dtype", "use_kv_cache_manager_v2")
            if getattr(self._settings, name, None) is not None
        }
        settings = self.upstream.call(
            "KvCacheConfig",
            must={"max_tokens": max(room * size, longest), "enable_block_reuse": False},
            # Manager V2 would keep 5 % of the blocks free, of which it has just enough.
            may={"tokens_per_block": size, "max_util_for_resume": 1.0, **given},
        )
        choose = self.upstream.get("get_kv_cache_manager_cls")
        manager = choose(
            self.config, **self.upstream.keywords(choose, may={"kv_cache_config": settings})
        )
        kinds, latent = self.upstream.get("CacheType"), self.geometry.latent
        heads, width = self.geometry.kv_heads, self.geometry.head_dim
        if latent is not None:
            heads, width = 1, latent.kv_lora_rank + latent.qk_rope_head_dim
        return manager(
            settings,
            kinds.SELF if latent is None else kinds.SELFKONLY,
            **self.upstream.keywords(
                manager,
                must={
                    "num_layers": 1,
                    "num_kv_heads": heads,
                    "head_dim": width,
                    "tokens_per_block": size,
                    "max_seq_len": longest,
                    "max_batch_size": largest["max_batch_size"],
                    "mapping": self.mapping,
                    "dtype": self._dtype(),
                },
                may={
                    "max_num_tokens": self.max_tokens,
                    "pretrained_config": self.config.pretrained_config,
                },
                one_of=self._sparse({}, "sparse_attention_config", "sparse_attn_config"),
            ),
        )

    def _dtype(self) -> Any:
        """The cache's element type, as the bindings name it."""
        if self.quantised() in ("FP8", "NVFP4"):
            return getattr(self.upstream.get("DataType"), self.quantised())
        return self.upstream.get("torch_dtype_to_binding")(self.config.torch_dtype)

    def _sparse(self, lowered: dict[str, str], *plain: str) -> dict[str, Callable[[], Any]] | None:
        """Names under which a sparse configuration is passed on, and how; None without one.

        Newer versions pass what a method of the configuration makes of it (``lowered``), older ones
        the configuration itself (``plain``).
        """
        if self.sparse is None:
            return None
        names: dict[str, Callable[[], Any]] = {
            name: lambda method=method: self._lower(method)  # type: ignore[misc]
            for name, method in lowered.items()
        }
        return names | dict.fromkeys(plain, lambda: self.sparse)

    def _lower(self, method: str) -> Any:
        lower = getattr(self.sparse, method, None)
        if lower is None:
            raise self.upstream.drift(f"{type(self.sparse).__name__} has no {method}")
        wanted = {"pretrained_config": self.config.pretrained_config}
        return lower(**self.upstream.keywords(lower, must=wanted))

    def _indexer(self) -> Any:
        """DSA's indexer, which its metadata must know before it is prepared."""
        attention = self.model.model.layers[0].self_attn
        for holder in (attention, getattr(attention, "mqa", None)):
            found = getattr(holder, "indexer", None)
            if found is not None:
                return found
        raise self.upstream.drift(f"{type(attention).__name__} has no indexer")


def server_features(args: Any) -> tuple[bool, bool]:
    """Whether the server reuses blocks of the KV cache, and whether it prefills in chunks."""
    settings = getattr(args, "kv_cache_config", None)
    reuse = bool(getattr(settings, "enable_block_reuse", True))
    return reuse, bool(getattr(args, "enable_chunked_prefill", False))
