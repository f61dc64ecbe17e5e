"""Checkpoints of random weights: what is in them, and that only whole ones appear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoints import SMALL, plan, read, shapes, small

from opkit.errors import BadInput
from opkit.layers import checkpoint as checkpoints
from opkit.layers.checkpoint import (
    bundled_models,
    cut_config,
    find_config,
    plan_checkpoint,
    write_checkpoint,
)
from opkit.layers.geometry import read_geometry

# Names as in the index files of the published checkpoints, with the shapes that follow.
NAMES = {
    "deepseek-v32": {
        "model.embed_tokens.weight": (128, 64),
        "model.layers.0.self_attn.q_a_proj.weight": (48, 64),
        "model.layers.0.self_attn.q_a_layernorm.weight": (48,),
        "model.layers.0.self_attn.q_b_proj.weight": (96, 48),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight": (40, 64),
        "model.layers.0.self_attn.kv_a_layernorm.weight": (32,),
        "model.layers.0.self_attn.kv_b_proj.weight": (128, 32),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.self_attn.indexer.wq_b.weight": (32, 48),
        "model.layers.0.self_attn.indexer.wk.weight": (16, 64),
        "model.layers.0.self_attn.indexer.k_norm.weight": (16,),
        "model.layers.0.self_attn.indexer.k_norm.bias": (16,),
        "model.layers.0.self_attn.indexer.weights_proj.weight": (2, 64),
        "model.layers.0.mlp.gate_proj.weight": (96, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
        "model.layers.2.mlp.gate.weight": (16, 64),
        "model.layers.2.mlp.gate.e_score_correction_bias": (16,),
        "model.layers.2.mlp.experts.15.up_proj.weight": (32, 64),
        "model.layers.2.mlp.experts.15.down_proj.weight": (64, 32),
        "model.layers.2.mlp.shared_experts.gate_proj.weight": (32, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (128, 64),
    },
    "qwen3": {
        "model.layers.1.input_layernorm.weight": (64,),
        "model.layers.1.post_attention_layernorm.weight": (64,),
        "model.layers.1.self_attn.q_proj.weight": (128, 64),
        "model.layers.1.self_attn.k_proj.weight": (64, 64),
        "model.layers.1.self_attn.v_proj.weight": (64, 64),
        "model.layers.1.self_attn.o_proj.weight": (64, 128),
        "model.layers.1.self_attn.q_norm.weight": (32,),
        "model.layers.1.self_attn.k_norm.weight": (32,),
        "model.layers.1.mlp.up_proj.weight": (96, 64),
    },
    "qwen3-moe": {
        "model.layers.0.mlp.gate.weight": (8, 64),
        "model.layers.3.mlp.experts.7.gate_proj.weight": (32, 64),
        "model.layers.3.mlp.experts.7.down_proj.weight": (64, 32),
    },
    "mixtral": {
        "model.layers.0.block_sparse_moe.gate.weight": (8, 64),
        "model.layers.0.block_sparse_moe.experts.7.w1.weight": (32, 64),
        "model.layers.0.block_sparse_moe.experts.7.w2.weight": (64, 32),
        "model.layers.0.block_sparse_moe.experts.7.w3.weight": (32, 64),
    },
    "llama": {"model.layers.3.self_attn.k_proj.weight": (16, 64)},
}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes(name: str) -> None:
    found = shapes(plan(name))
    assert NAMES[name].items() <= found.items()


def test_what_an_architecture_lacks_is_not_there() -> None:
    v3 = shapes(plan_checkpoint(small("deepseek-v32") | {"architectures": [
        "DeepseekV3ForCausalLM"]}, "v3"))  # fmt: skip
    assert not any("indexer" in name for name in v3)
    assert not any("norm" in name for name in shapes(plan("llama")) if "self_attn" in name)
    assert "lm_head.weight" not in shapes(plan("qwen3", tie_word_embeddings=True))
    qwen2 = shapes(plan("qwen3", architectures=["Qwen2ForCausalLM"]))
    assert qwen2["model.layers.0.self_attn.q_proj.bias"] == (128,)
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2
    assert not any(name.endswith(".bias") for name in shapes(plan("qwen3")))


def test_the_published_size() -> None:
    # Mixtral-8x7B has 46.7 billion parameters in 32 layers (Jiang et al. 2024).
    config = bundled_models()["mixtral"] | {"num_hidden_layers": 32}
    found = plan_checkpoint(config, "mixtral")
    assert sum(item.elements for item in found.weights()) == pytest.approx(46.7e9, rel=1e-3)
    # Qwen3-30B-A3B has 30.5 billion in 48, Llama-3.1-8B 8.03 billion in 32.
    qwen = plan_checkpoint(bundled_models()["qwen3-moe"], "qwen", 48)
    assert sum(item.elements for item in qwen.weights()) == pytest.approx(30.5e9, rel=2e-3)
    llama = plan_checkpoint(bundled_models()["llama"], "llama", 32)
    assert sum(item.elements for item in llama.weights()) == pytest.approx(8.03e9, rel=1e-3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_written(name: str, dtype: str, tmp_path: Path) -> None:
    found = plan_checkpoint(small(name), name, dtype=dtype)
    told: list[float] = []
    write_checkpoint(found, tmp_path / "made", say=lambda _, done: told.append(done))
    assert sorted(told) == told
    assert told[-1] == 1.0
    tensors = read(tmp_path / "made")
    assert {key: item[1].shape for key, item in tensors.items()} == shapes(found)
    for weight in found.weights():
        kind, values = tensors[weight.name]
        assert kind == checkpoints.DTYPES[weight.dtype or dtype][0]
        # The mean and deviation of the recipe, as far as so many samples can tell.
        assert abs(values.mean() - weight.mean) < 5 * weight.deviation / np.sqrt(values.size) + 0.01
        if values.size >= 1000:
            assert values.std() == pytest.approx(weight.deviation, rel=0.1)
        assert len(np.unique(values)) > min(8, values.size) / 2
    geometry = read_geometry(tmp_path / "made")
    assert geometry.dtype == dtype
    files = {path.name for path in (tmp_path / "made").iterdir()}
    assert files == {"config.json", "model.safetensors.index.json", *map(found.file_of, range(1))}


def test_linear_layers_keep_the_deviation() -> None:
    found = {item.name: item for item in plan("deepseek-v32").weights()}
    for name, item in found.items():
        if name.endswith("_proj.weight"):
            assert item.deviation == pytest.approx(item.shape[1] ** -0.5)
    assert found["model.norm.weight"].mean == 1.0
    assert found["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == "float32"


def test_values_follow_from_seed_and_name(tmp_path: Path) -> None:
    write_checkpoint(plan("qwen3", 1), tmp_path / "one")
    write_checkpoint(plan("qwen3", 2), tmp_path / "two")
    other = plan_checkpoint(small("qwen3"), "qwen3", 1, seed=1)
    write_checkpoint(other, tmp_path / "other")
    one, two, three = (read(tmp_path / name) for name in ("one", "two", "other"))
    assert one.keys() < two.keys()
    assert all((one[name][1] == two[name][1]).all() for name in one)
    assert all((one[name][1] != three[name][1]).any() for name in one)
    keys = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"]
    assert (one[keys[0]][1] != one[keys[1]][1]).any()


def test_chunks_do_not_repeat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "CHUNK", 100)
    write_checkpoint(plan("llama", 1), tmp_path / "made")
    values = read(tmp_path / "made")["lm_head.weight"][1].ravel()
    assert (values[:100] != values[100:200]).any()
    assert values.std() == pytest.approx(1 / 8, rel=0.05)


def test_bfloat16_is_rounded_to_nearest() -> None:
    found = plan("llama")
    weight = next(found.weights())
    rough = np.frombuffer(checkpoints._draw(found, weight, 0), "<u2").astype(np.uint32) << 16
    exact = np.frombuffer(
        checkpoints._draw(plan_checkpoint(small("llama"), "", dtype="float32"), weight, 0), "<f4"
    )
    # Half of a unit in the last of 8 bits, at most, and upwards as often as downwards.
    error = (rough.view(np.float32) - exact) / np.abs(exact)
    assert np.abs(error).max() <= 2**-8
    assert abs(error.mean()) < 1e-4


def test_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 40_000)
    found = plan("qwen3")
    write_checkpoint(found, tmp_path / "made")
    assert len(found.shards) > 2
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    for shard in found.shards:
        assert sum(map(found.bytes_of, shard)) <= 40_000 or len(shard) == 1
    monkeypatch.undo()
    write_checkpoint(plan("qwen3"), tmp_path / "whole")
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "made")
    assert whole.keys() == parts.keys()
    assert all((whole[name][1] == parts[name][1]).all() for name in whole)


def test_a_cut_configuration_is_whole() -> None:
    config = small(
        "deepseek-v32", num_hidden_layers=61, first_k_dense_replace=3, num_nextn_predict_layers=1,
        quantization_config={"quant_method": "fp8"}, auto_map={"AutoConfig": "x.Y"},
        layer_types=["full_attention"] * 61,
    )  # fmt: skip
    cut = cut_config(config, 4, "bfloat16")
    assert (cut["num_hidden_layers"], cut["first_k_dense_replace"]) == (4, 3)
    assert cut["num_nextn_predict_layers"] == 0
    assert len(cut["layer_types"]) == 4
    assert not {"quantization_config", "auto_map"} & cut.keys()
    # A layer with experts stays, however few there are.
    assert cut_config(config, 2, "bfloat16")["first_k_dense_replace"] == 1
    assert cut_config(config, 1, "bfloat16")["first_k_dense_replace"] == 0
    assert cut_config(config, None, "bfloat16")["num_hidden_layers"] == 61


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention_bias": True}, "attention_bias True has tensors that opkit does not know"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"architectures": ["OtherForCausalLM"]}, "unknown architecture"),
    ],
)
def test_what_cannot_be_made(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        plan("llama", **changes)


def test_unknown_element_types() -> None:
    with pytest.raises(BadInput, match="unknown element type 'int4'; known: bfloat16"):
        plan_checkpoint(small("llama"), "llama", dtype="int4")


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    def fail(_: str, _done: float) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "deep" / "made"
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(plan("llama"), out, say=fail)
    assert list(out.parent.iterdir()) == []


def test_what_is_there_is_only_replaced_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "made"
    write_checkpoint(plan("llama", 2), out)
    with pytest.raises(BadInput, match="is there already"):
        write_checkpoint(plan("llama", 1), out)
    assert read_geometry(out).layers == 2
    write_checkpoint(plan("llama", 1), out, force=True)
    assert read_geometry(out).layers == 1
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    other = tmp_path / "photographs"
    other.mkdir()
    with pytest.raises(BadInput, match="is no checkpoint"):
        write_checkpoint(plan("llama"), other, force=True)


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(BadInput, match=r"0\.0 GB are free") as caught:
        write_checkpoint(plan("llama"), tmp_path / "made")
    assert "--layers" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_configurations_are_found(tmp_path: Path) -> None:
    assert find_config("qwen3")[0]["architectures"] == ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(small("llama")))
    assert find_config(str(tmp_path))[0]["hidden_size"] == 64
    with pytest.raises(BadInput, match="gpt: no such configuration") as caught:
        find_config("gpt")
    assert "mixtral" in str(caught.value.hint)
