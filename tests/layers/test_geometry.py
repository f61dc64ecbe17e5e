"""Geometry of a model, and one rank's share of it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import BadInput
from opkit.layers.geometry import (
    ARCHITECTURES,
    Geometry,
    geometry_of,
    local_overrides,
    read_geometry,
)
from opkit.layers.registry import OPS

MODELS = resources.files("opkit.layers").joinpath("models")
NAMES = ("deepseek-v3", "deepseek-v32", "qwen3", "mixtral", "qwen3-moe", "llama")


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A bundled configuration with other values; None takes a key away."""
    data: dict[str, Any] = json.loads(MODELS.joinpath(f"{name}.json").read_text("utf-8"))
    merged = data | changes
    return {key: value for key, value in merged.items() if value is not None}


def geometry(name: str, **changes: Any) -> Geometry:
    return geometry_of(config(name, **changes), f"{name}.json")


# What the reports and model cards of these models say of one layer.
PUBLISHED = {
    "deepseek-v3": (7168, 128, 128, 192, 18432),
    "deepseek-v32": (7168, 128, 128, 192, 18432),
    "qwen3": (5120, 64, 8, 128, 25600),
    "mixtral": (4096, 32, 8, 128, 0),
    "qwen3-moe": (2048, 32, 4, 128, 6144),
    "llama": (4096, 32, 8, 128, 14336),
}


@pytest.mark.parametrize("name", NAMES)
def test_bundled_models_have_their_published_layers(name: str) -> None:
    found = geometry(name)
    sizes = (
        found.hidden_size, found.heads, found.kv_heads, found.head_dim, found.intermediate_size
    )  # fmt: skip
    assert sizes == PUBLISHED[name]
    assert found.layers == 4
    assert found.dtype == "bfloat16"


def test_experts() -> None:
    deepseek, mixtral = geometry("deepseek-v3").experts, geometry("mixtral").experts
    qwen = geometry("qwen3-moe").experts
    assert deepseek is not None
    assert mixtral is not None
    assert qwen is not None
    assert (deepseek.topk, deepseek.intermediate_size, deepseek.shared_intermediate_size) == (
        8, 2048, 2048,
    )  # fmt: skip
    assert (deepseek.scoring, deepseek.bias, deepseek.scale) == ("sigmoid", True, 2.5)
    assert [deepseek.in_layer(layer) for layer in range(4)] == [False, False, False, True]
    assert (mixtral.number, mixtral.topk, mixtral.intermediate_size) == (8, 2, 14336)
    assert (qwen.number, qwen.topk, qwen.intermediate_size) == (128, 8, 768)
    assert all(qwen.in_layer(layer) for layer in range(4))


def test_qwen_counts_layers_from_one() -> None:
    # Qwen3MoeDecoderLayer: experts where (layer + 1) % decoder_sparse_step == 0.
    found = geometry("qwen3-moe", decoder_sparse_step=2, mlp_only_layers=[3]).experts
    assert found is not None
    assert [found.in_layer(layer) for layer in range(6)] == [
        False, True, False, False, False, True,
    ]  # fmt: skip


def test_the_indexer_tells_v32_from_v3() -> None:
    assert geometry("deepseek-v3").indexer is None
    indexer = geometry("deepseek-v32").indexer
    assert indexer is not None
    assert (indexer.heads, indexer.head_dim, indexer.topk) == (64, 128, 2048)


def test_glm_reads_as_deepseek() -> None:
    found = geometry("deepseek-v32", architectures=["GlmMoeDsaForCausalLM"], n_group=1,
                     topk_group=1, rope_theta=None,
                     rope_parameters={"rope_theta": 1e6, "rope_type": "default"})  # fmt: skip
    assert found.indexer is not None
    assert found.rope_theta == 1e6
    assert found.experts is not None
    assert found.experts.groups == 1


def test_norms_biases_and_windows_differ_by_architecture() -> None:
    assert geometry("qwen3").qk_norm
    assert geometry("qwen3-moe").qk_norm
    assert not geometry("llama").qk_norm
    qwen2 = geometry("qwen3", architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias
    assert not qwen2.qk_norm
    assert not geometry("llama").qkv_bias
    assert geometry("llama", attention_bias=True).qkv_bias
    assert geometry("mixtral", sliding_window=4096).sliding_window == 4096
    # Qwen has the key also where the window is off.
    assert geometry("qwen3", sliding_window=4096).sliding_window == 0
    windowed = geometry("qwen3", sliding_window=4096, use_sliding_window=True)
    assert windowed.sliding_window == 4096


def test_what_llama_may_leave_out() -> None:
    found = geometry("llama", num_key_value_heads=None, head_dim=None, rope_theta=None,
                     torch_dtype=None, dtype="float16")  # fmt: skip
    assert (found.kv_heads, found.head_dim, found.rope_theta) == (32, 128, 10_000.0)
    assert found.dtype == "float16"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llama", "hidden_size"),
        ("llama", "rms_norm_eps"),
        ("llama", "torch_dtype"),
        ("qwen3", "rope_theta"),
        ("mixtral", "num_local_experts"),
        ("qwen3-moe", "norm_topk_prob"),
        ("deepseek-v3", "scoring_func"),
        ("deepseek-v3", "kv_lora_rank"),
        ("deepseek-v32", "index_topk"),
        ("deepseek-v32", "first_k_dense_replace"),
    ],
)
def test_a_missing_key_is_named_with_its_file(name: str, key: str) -> None:
    with pytest.raises(BadInput, match=rf"{name}\.json: {key} is missing"):
        geometry(name, **{key: None})


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("llama", {"hidden_size": 0}, "hidden_size must be a whole number from 1 on, not 0"),
        ("llama", {"hidden_size": 4096.5}, "hidden_size must be a whole number"),
        ("llama", {"vocab_size": True}, "vocab_size must be a whole number"),
        ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above zero"),
        ("llama", {"num_key_value_heads": 5}, "32 heads cannot share 5"),
        ("qwen3", {"use_sliding_window": "yes"}, "use_sliding_window must be true or false"),
        ("qwen3-moe", {"mlp_only_layers": [-1]}, "mlp_only_layers must be a list"),
        ("mixtral", {"num_experts_per_tok": 9}, "9 experts a token of 8"),
        ("deepseek-v3", {"scoring_func": "tanh"}, "scoring_func must be one of"),
        ("deepseek-v3", {"n_group": 7}, "64 experts cannot be put in 7 groups"),
    ],
)
def test_impossible_values_are_named(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        geometry(name, **changes)


@pytest.mark.parametrize("architectures", [["GptOssForCausalLM"], [], {}, "", [["x"]]])
def test_unknown_architectures_list_the_known(architectures: Any) -> None:
    with pytest.raises(BadInput, match="unknown architecture") as caught:
        geometry("llama", architectures=architectures)
    assert all(name in str(caught.value.hint) for name in ARCHITECTURES)


def test_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(BadInput, match=r"config\.json: no readable model configuration"):
        read_geometry(tmp_path)
    file.write_text("[]")
    with pytest.raises(BadInput, match="not a JSON object"):
        read_geometry(tmp_path)
    file.write_text(json.dumps(config("qwen3")))
    assert read_geometry(tmp_path) == read_geometry(file) == geometry("qwen3")


def test_one_rank_of_grouped_heads() -> None:
    found = geometry("qwen3").local(4)
    assert (found.heads, found.kv_heads, found.head_dim, found.intermediate_size) == (
        16, 2, 128, 6400,
    )  # fmt: skip
    assert geometry("qwen3").local(1) == geometry("qwen3")
    # More ranks than key and value heads: each rank has a copy of one.
    assert geometry("qwen3").local(16).kv_heads == 1
    with pytest.raises(BadInput, match="num_attention_heads 64 cannot be shared by 3 ranks"):
        geometry("qwen3").local(3)


def test_one_rank_of_latent_heads_and_experts() -> None:
    found = geometry("deepseek-v3").local(8)
    assert (found.heads, found.kv_heads, found.intermediate_size) == (16, 16, 2304)
    assert found.latent == geometry("deepseek-v3").latent
    assert found.experts is not None
    assert (found.experts.intermediate_size, found.experts.shared_intermediate_size) == (256, 256)
    assert found.experts.number == 64
    mixtral = geometry("mixtral").local(2).experts
    assert mixtral is not None
    assert mixtral.intermediate_size == 7168


def test_only_what_is_asked_for_is_shared() -> None:
    found = geometry("qwen3-moe").local(4, ("moe_intermediate_size",))
    assert found.experts is not None
    assert (found.experts.intermediate_size, found.heads, found.intermediate_size) == (
        192, 32, 6144,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", OPS)
def test_overrides_make_the_local_geometry(name: str, op: str) -> None:
    # A model whose configuration is overridden is the rank's part of the model.
    shares = OPS[op].shares
    local = local_overrides(config(name), 4, shares, name)
    assert geometry_of(config(name) | local, name) == geometry(name).local(4, shares)
    assert local_overrides(config(name), 1, shares, name) == {}


def test_overrides_write_the_head_size_that_would_change() -> None:
    # Llama's head size follows from the number of heads: 4096 / 32.
    shares = OPS["gqa"].shares
    assert local_overrides(config("llama"), 8, shares, "llama") == {
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128,
    }  # fmt: skip
    with pytest.raises(BadInput, match="llama: num_attention_heads 32 cannot be shared by 64"):
        local_overrides(config("llama"), 64, shares, "llama")
