"""The geometry of a model, from its ``config.json``, and one tensor-parallel rank's share of it.

Keys are read as the serving engines read them (vLLM 0.24.0, ``model_executor/models``:
``deepseek_v2.py``, ``llama.py``, ``qwen2.py``, ``qwen3.py``, ``qwen3_moe.py``, ``mixtral.py``). A
key whose default differs between engines is asked for, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opkit.errors import BadInput
from opkit.layers.model_config import ModelConfig, local_overrides, read_config, share

__all__ = [
    "ARCHITECTURES", "SHARES", "Experts", "Geometry", "Indexer", "Latent", "geometry_of",
    "local_overrides", "read_geometry",
]  # fmt: skip

# Keys of config.json of which a tensor-parallel rank has its share, or whose default follows from
# one of them.
SHARES = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "moe_intermediate_size",
)  # fmt: skip
_DTYPES = ("bfloat16", "float16", "float32")  # of activations; quantised weights are told elsewhere
# What rope is built with where a configuration says nothing (transformers, LlamaConfig).
_LLAMA_THETA = 10_000.0


@dataclass(frozen=True)
class Latent:
    """Sizes of multi-head latent attention, elements; none is shared by tensor-parallel ranks."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class Indexer:
    """Sizes of DeepSeek's lightning indexer, which every tensor-parallel rank has whole.

    Attributes:
        heads: of the indexer.
        head_dim: elements.
        topk: tokens that it picks for a query.
    """

    heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, and the layers that have one.

    Attributes:
        number: routed experts.
        topk: experts of a token.
        intermediate_size: of one routed expert, elements.
        shared_intermediate_size: of the shared experts together; 0 without any.
        groups, topk_groups: expert groups, and those a token may pick from; 1 and 1: no groups.
        scoring: ``softmax`` or ``sigmoid`` of the router's logits.
        scale: factor on the routed experts' sum.
        renormalize: whether a token's expert weights are made to sum to 1.
        bias: whether experts are picked by score plus a learned bias (``noaux_tc``).
        first_dense: layers before this one have a plain MLP.
        every: from there on, layers for which ``(layer + offset) % every == 0`` have experts.
        offset: see ``every``.
        dense_layers: layers that have a plain MLP all the same.
    """

    number: int
    topk: int
    intermediate_size: int
    shared_intermediate_size: int
    groups: int
    topk_groups: int
    scoring: str
    scale: float
    renormalize: bool
    bias: bool
    first_dense: int
    every: int
    offset: int = 0
    dense_layers: tuple[int, ...] = ()

    def in_layer(self, layer: int) -> bool:
        """Whether ``layer``, counted from 0, has experts."""
        return (
            layer >= self.first_dense
            and (layer + self.offset) % self.every == 0
            and layer not in self.dense_layers
        )


@dataclass(frozen=True)
class Geometry:
    """What the shapes of a model's layers follow from.

    Attributes:
        architecture: class name, as config.json has it.
        hidden_size: elements of a token's state.
        layers: decoder layers.
        vocab_size: tokens known.
        heads: query heads.
        kv_heads: key and value heads; with latent attention as many as query heads.
        head_dim: elements of a head; with latent attention of its query (without and with rope).
        intermediate_size: of a dense layer's MLP, elements; 0 for a model without one.
        sliding_window: tokens that a query sees; 0: all.
        norm_eps: of the RMS norms.
        rope_theta: base of the rotary embedding.
        max_position: longest sequence, tokens.
        dtype: element type that the configuration names, as torch writes it.
        latent, indexer, experts: None when the architecture has none.
        qk_norm: whether query and key heads are normed.
        qkv_bias: whether the projections to query, key and value have a bias.
        tied: whether the output projection is the embedding.
    """

    architecture: str
    hidden_size: int
    layers: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    sliding_window: int
    norm_eps: float
    rope_theta: float
    max_position: int
    dtype: str
    latent: Latent | None
    indexer: Indexer | None
    experts: Experts | None
    qk_norm: bool
    qkv_bias: bool = False
    tied: bool = False

    def local(self, tp_size: int, shares: Sequence[str] = SHARES) -> Geometry:
        """One rank's part of the model.

        Args:
            tp_size: tensor-parallel ranks.
            shares: keys of config.json that are shared; the others stay the model's. Of
                ``num_key_value_heads`` each rank has one where there are more ranks than heads.

        Raises:
            BadInput: the message names what cannot be shared.
        """

        def local(key: str, value: int) -> int:
            if key not in shares or not value:
                return value
            return share(key, value, tp_size, self.architecture)

        # With latent attention every query head has its own key and value.
        kv_key = "num_attention_heads" if self.latent else "num_key_value_heads"
        experts = self.experts
        if experts is not None:
            mixtral = self.architecture == "MixtralForCausalLM"
            key = "intermediate_size" if mixtral else "moe_intermediate_size"
            experts = replace(
                experts,
                intermediate_size=local(key, experts.intermediate_size),
                shared_intermediate_size=local(key, experts.shared_intermediate_size),
            )
        return replace(
            self,
            heads=local("num_attention_heads", self.heads),
            kv_heads=local(kv_key, self.kv_heads),
            intermediate_size=local("intermediate_size", self.intermediate_size),
            experts=experts,
        )


def read_geometry(model_folder: str | Path) -> Geometry:
    """The geometry of the model in a folder (or of a ``config.json`` given by name).

    Raises:
        BadInput: unreadable, an unknown architecture (known ones are listed), or a missing or
            impossible value, named with the file.
    """
    return geometry_of(*read_config(model_folder))


def geometry_of(config: Mapping[str, Any], origin: str) -> Geometry:
    """The geometry that ``config`` describes.

    Args:
        config: the content of a config.json.
        origin: its file's name, for errors.

    Raises:
        BadInput: see :func:`read_geometry`.
    """
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise BadInput(
            f"{origin}: unknown architecture {architecture!r}",
            f"known: {', '.join(ARCHITECTURES)}",
        )
    found = ARCHITECTURES[architecture](ModelConfig(config, origin), architecture)
    experts = found.experts
    if experts is not None and experts.topk > experts.number:
        raise BadInput(f"{origin}: {experts.topk} experts a token of {experts.number} in all")
    if experts is not None and experts.number % experts.groups:
        raise BadInput(
            f"{origin}: {experts.number} experts cannot be put in {experts.groups} groups"
        )
    if found.latent is None and found.heads % found.kv_heads:
        raise BadInput(
            f"{origin}: {found.heads} heads cannot share {found.kv_heads} key and value heads"
        )
    return found


def _deepseek(config: ModelConfig, architecture: str) -> Geometry:
    latent = Latent(
        q_lora_rank=config.whole("q_lora_rank"),
        kv_lora_rank=config.whole("kv_lora_rank"),
        qk_nope_head_dim=config.whole("qk_nope_head_dim"),
        qk_rope_head_dim=config.whole("qk_rope_head_dim"),
        v_head_dim=config.whole("v_head_dim"),
    )
    indexer = None
    if architecture != "DeepseekV3ForCausalLM":
        indexer = Indexer(
            heads=config.whole("index_n_heads"),
            head_dim=config.whole("index_head_dim"),
            topk=config.whole("index_topk"),
        )
    size = config.whole("moe_intermediate_size")
    experts = Experts(
        number=config.whole("n_routed_experts"),
        topk=config.whole("num_experts_per_tok"),
        intermediate_size=size,
        shared_intermediate_size=size * config.whole("n_shared_experts", 0, 0),
        groups=config.whole("n_group", 1),
        topk_groups=config.whole("topk_group", 1),
        scoring=config.word("scoring_func", ("softmax", "sigmoid")),
        scale=config.number("routed_scaling_factor", 1.0),
        renormalize=config.flag("norm_topk_prob"),
        bias=config.word("topk_method") == "noaux_tc",
        first_dense=config.whole("first_k_dense_replace", least=0),
        every=config.whole("moe_layer_freq", 1),
    )
    heads = config.whole("num_attention_heads")
    return _common(
        config, architecture, heads, heads,
        head_dim=latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        intermediate=config.whole("intermediate_size"),
        latent=latent, indexer=indexer, experts=experts,
    )  # fmt: skip


def _dense(config: ModelConfig, architecture: str) -> Geometry:
    llama = architecture == "LlamaForCausalLM"
    window = 0
    if not llama and config.flag("use_sliding_window", False):
        window = config.whole("sliding_window")
    return _grouped(
        config, architecture, window, config.whole("intermediate_size"), None,
        # Qwen2 always has one; vLLM's and transformers' Llama and Qwen3 ask the configuration.
        qkv_bias=architecture == "Qwen2ForCausalLM" or config.flag("attention_bias", False),
        theta=_LLAMA_THETA if llama else None,
    )  # fmt: skip


def _qwen3_moe(config: ModelConfig, architecture: str) -> Geometry:
    experts = Experts(
        number=config.whole("num_experts"),
        topk=config.whole("num_experts_per_tok"),
        intermediate_size=config.whole("moe_intermediate_size"),
        shared_intermediate_size=0,
        groups=1,
        topk_groups=1,
        scoring="softmax",
        scale=1.0,
        renormalize=config.flag("norm_topk_prob"),
        bias=False,
        first_dense=0,
        every=config.whole("decoder_sparse_step", 1),
        offset=1,  # Qwen counts layers from 1 here
        dense_layers=config.wholes("mlp_only_layers"),
    )
    window = config.whole("sliding_window") if config.flag("use_sliding_window", False) else 0
    return _grouped(
        config, architecture, window, config.whole("intermediate_size"), experts,
        qkv_bias=config.flag("attention_bias", False), theta=None,
    )  # fmt: skip


def _mixtral(config: ModelConfig, architecture: str) -> Geometry:
    experts = Experts(
        number=config.whole("num_local_experts"),
        topk=config.whole("num_experts_per_tok"),
        intermediate_size=config.whole("intermediate_size"),
        shared_intermediate_size=0,
        groups=1,
        topk_groups=1,
        scoring="softmax",
        scale=1.0,
        renormalize=True,  # Mixtral has no key for it
        bias=False,
        first_dense=0,
        every=1,
    )
    window = config.whole("sliding_window") if config.has("sliding_window") else 0
    return _grouped(config, architecture, window, 0, experts, qkv_bias=False, theta=None)


def _grouped(
    config: ModelConfig,
    architecture: str,
    window: int,
    intermediate: int,
    experts: Experts | None,
    *,
    qkv_bias: bool,
    theta: float | None,
) -> Geometry:
    """A model of grouped-query attention."""
    heads = config.whole("num_attention_heads")
    return _common(
        config, architecture, heads, config.whole("num_key_value_heads", heads),
        head_dim=config.whole("head_dim", config.whole("hidden_size") // heads or None),
        intermediate=intermediate, experts=experts, window=window, qkv_bias=qkv_bias, theta=theta,
    )  # fmt: skip


def _common(
    config: ModelConfig,
    architecture: str,
    heads: int,
    kv_heads: int,
    *,
    head_dim: int,
    intermediate: int,
    latent: Latent | None = None,
    indexer: Indexer | None = None,
    experts: Experts | None = None,
    window: int = 0,
    qkv_bias: bool = False,
    theta: float | None = None,
) -> Geometry:
    return Geometry(
        architecture=architecture,
        hidden_size=config.whole("hidden_size"),
        layers=config.whole("num_hidden_layers"),
        vocab_size=config.whole("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        sliding_window=window,
        norm_eps=config.number("rms_norm_eps"),
        rope_theta=config.rope_theta(theta),
        max_position=config.whole("max_position_embeddings"),
        # Newer files say dtype, older ones torch_dtype.
        dtype=config.word("dtype" if config.has("dtype") else "torch_dtype", _DTYPES),
        latent=latent,
        indexer=indexer,
        experts=experts,
        qk_norm=architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
        qkv_bias=qkv_bias,
        tied=config.flag("tie_word_embeddings", False),
    )


ARCHITECTURES: dict[str, Callable[[ModelConfig, str], Geometry]] = {
    "DeepseekV3ForCausalLM": _deepseek,
    "DeepseekV32ForCausalLM": _deepseek,
    "GlmMoeDsaForCausalLM": _deepseek,
    "LlamaForCausalLM": _dense,
    "Qwen2ForCausalLM": _dense,
    "Qwen3ForCausalLM": _dense,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
}
