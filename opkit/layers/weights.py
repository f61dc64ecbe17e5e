"""The weights of a model by name, shape and recipe, as checkpoints of its architecture name them.

Names are those that vLLM 0.24.0 loads (``load_weights`` in ``model_executor/models``: files
``deepseek_v2.py``, ``llama.py``, ``qwen2.py``, ``qwen3.py``, ``qwen3_moe.py``, ``mixtral.py``),
which are Hugging Face's.

The recipe keeps activations near deviation 1 all through the model, so that no kernel meets zeros,
overflow or rows that are all alike:

- Linear layers: normal, deviation 1/sqrt(input features) (He et al. 2015 without the factor for
  ReLU): a normed input of deviation 1 gives an output of deviation 1, whatever the sizes. The 0.02
  of ``initializer_range`` does so at 2,500 features only: at 7,168 a router's logit would have
  deviation 1.7, behind a latent of 512 it would be 0.45. Attention scores get deviation 1: a
  softmax that is neither flat nor a single token.
- Embedding: normal, deviation 1. With 0.02 the first attention, a mean over the context, would
  drown it, every token's state would be nearly that mean, and routers would send all tokens to the
  same experts.
- Norms: 1 plus normal noise of deviation 0.1, so that their product is no copy.
- Routers: as linear layers. Logits of deviation 1 over states that differ spread the tokens evenly
  but not equally. ``e_score_correction_bias``: normal, deviation 0.01, less than a score's spread.
- Other biases: normal, deviation 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from opkit.layers.geometry import Experts, Geometry, Latent

EMBEDDING, NORM, ROUTER_BIAS, BIAS = 1.0, 0.1, 0.01, 0.02  # deviations


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
        name: as in the checkpoint.
        shape: its dimensions; of a linear layer [outputs, inputs].
        deviation: of its normal values.
        mean: of its values.
        dtype: element type where it is not the model's.
    """

    name: str
    shape: tuple[int, ...]
    deviation: float
    mean: float = 0.0
    dtype: str = ""

    @property
    def elements(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def weights_of(model: Geometry) -> Iterator[Weight]:
    """All weights of a model, in the order of its layers."""
    yield Weight("model.embed_tokens.weight", (model.vocab_size, model.hidden_size), EMBEDDING)
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        yield _norm(f"{prefix}.input_layernorm", model.hidden_size)
        if model.latent is not None:
            yield from _latent(f"{prefix}.self_attn", model, model.latent)
        else:
            yield from _grouped(f"{prefix}.self_attn", model)
        yield _norm(f"{prefix}.post_attention_layernorm", model.hidden_size)
        if model.experts is not None and model.experts.in_layer(layer):
            yield from _experts(prefix, model, model.experts)
        else:
            yield from _mlp(f"{prefix}.mlp", model.hidden_size, model.intermediate_size)
    yield _norm("model.norm", model.hidden_size)
    if not model.tied:
        yield _linear("lm_head", model.vocab_size, model.hidden_size)


def _linear(name: str, outputs: int, inputs: int) -> Weight:
    return Weight(f"{name}.weight", (outputs, inputs), 1 / math.sqrt(inputs))


def _norm(name: str, size: int) -> Weight:
    return Weight(f"{name}.weight", (size,), NORM, mean=1.0)


def _grouped(prefix: str, model: Geometry) -> Iterator[Weight]:
    """Grouped-query attention."""
    heads = {"q": model.heads, "k": model.kv_heads, "v": model.kv_heads}
    for name, count in heads.items():
        yield _linear(f"{prefix}.{name}_proj", count * model.head_dim, model.hidden_size)
        if model.qkv_bias:
            yield Weight(f"{prefix}.{name}_proj.bias", (count * model.head_dim,), BIAS)
    yield _linear(f"{prefix}.o_proj", model.hidden_size, model.heads * model.head_dim)
    if model.qk_norm:
        yield _norm(f"{prefix}.q_norm", model.head_dim)
        yield _norm(f"{prefix}.k_norm", model.head_dim)


def _latent(prefix: str, model: Geometry, size: Latent) -> Iterator[Weight]:
    """Latent attention, and the indexer where there is one."""
    query = size.qk_nope_head_dim + size.qk_rope_head_dim
    yield _linear(f"{prefix}.q_a_proj", size.q_lora_rank, model.hidden_size)
    yield _norm(f"{prefix}.q_a_layernorm", size.q_lora_rank)
    yield _linear(f"{prefix}.q_b_proj", model.heads * query, size.q_lora_rank)
    entry = size.kv_lora_rank + size.qk_rope_head_dim
    yield _linear(f"{prefix}.kv_a_proj_with_mqa", entry, model.hidden_size)
    yield _norm(f"{prefix}.kv_a_layernorm", size.kv_lora_rank)
    key_and_value = size.qk_nope_head_dim + size.v_head_dim
    yield _linear(f"{prefix}.kv_b_proj", model.heads * key_and_value, size.kv_lora_rank)
    yield _linear(f"{prefix}.o_proj", model.hidden_size, model.heads * size.v_head_dim)
    if model.indexer is not None:
        heads, head_dim = model.indexer.heads, model.indexer.head_dim
        yield _linear(f"{prefix}.indexer.wq_b", heads * head_dim, size.q_lora_rank)
        yield _linear(f"{prefix}.indexer.wk", head_dim, model.hidden_size)
        yield _norm(f"{prefix}.indexer.k_norm", head_dim)  # a layer norm: it has a bias too
        yield Weight(f"{prefix}.indexer.k_norm.bias", (head_dim,), BIAS)
        yield _linear(f"{prefix}.indexer.weights_proj", heads, model.hidden_size)


def _mlp(prefix: str, hidden: int, size: int) -> Iterator[Weight]:
    yield _linear(f"{prefix}.gate_proj", size, hidden)
    yield _linear(f"{prefix}.up_proj", size, hidden)
    yield _linear(f"{prefix}.down_proj", hidden, size)


def _experts(layer: str, model: Geometry, experts: Experts) -> Iterator[Weight]:
    """Router and experts; Mixtral has names of its own."""
    hidden, size = model.hidden_size, experts.intermediate_size
    mixtral = model.architecture == "MixtralForCausalLM"
    prefix = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
    yield _linear(f"{prefix}.gate", experts.number, hidden)
    if experts.bias:
        name = f"{prefix}.gate.e_score_correction_bias"
        yield Weight(name, (experts.number,), ROUTER_BIAS, dtype="float32")
    for number in range(experts.number):
        one = f"{prefix}.experts.{number}"
        if mixtral:
            yield _linear(f"{one}.w1", size, hidden)
            yield _linear(f"{one}.w3", size, hidden)
            yield _linear(f"{one}.w2", hidden, size)
        else:
            yield from _mlp(one, hidden, size)
    if experts.shared_intermediate_size:
        yield from _mlp(f"{prefix}.shared_experts", hidden, experts.shared_intermediate_size)
