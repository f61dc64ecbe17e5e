"""Checkpoints as the safetensors library and torch read them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import plan, read

from opkit.layers.checkpoint import write_checkpoint

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
safetensors = pytest.importorskip("safetensors", reason="no safetensors: make test-torch")


@pytest.mark.parametrize("name", ["deepseek-v32", "mixtral"])
def test_the_library_reads_the_same(name: str, tmp_path: Path) -> None:
    found = plan(name)
    write_checkpoint(found, tmp_path / "made")
    ours = read(tmp_path / "made")
    seen = set()
    for path in (tmp_path / "made").glob("*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118  # the library's object is no dictionary
                tensor = file.get_tensor(key)
                wanted = torch.float32 if key.endswith("correction_bias") else torch.bfloat16
                assert tensor.dtype == wanted
                assert np.array_equal(tensor.float().numpy(), ours[key][1])
                seen.add(key)
    assert seen == {item.name for item in found.weights()}


def test_activations_keep_their_scale(tmp_path: Path) -> None:
    # Through an MLP and a router, as the layers call them: deviation near 1, routing spread.
    write_checkpoint(plan("mixtral", hidden_size=512, intermediate_size=1024), tmp_path / "made")
    tensors = {key: torch.from_numpy(item[1]) for key, item in read(tmp_path / "made").items()}
    tokens = torch.arange(128)
    hidden = tensors["model.embed_tokens.weight"][tokens]
    normed = torch.nn.functional.rms_norm(
        hidden, (512,), tensors["model.layers.0.post_attention_layernorm.weight"]
    )
    prefix = "model.layers.0.block_sparse_moe"
    logits = normed @ tensors[f"{prefix}.gate.weight"].T
    assert float(logits.std()) == pytest.approx(1.0, abs=0.15)
    counts = torch.bincount(logits.topk(2).indices.ravel(), minlength=8)
    assert int(counts.min()) > 0
    assert int(counts.max()) < 3 * 128 * 2 / 8
    gate, up = (normed @ tensors[f"{prefix}.experts.0.{name}.weight"].T for name in ("w1", "w3"))
    out = (torch.nn.functional.silu(gate) * up) @ tensors[f"{prefix}.experts.0.w2.weight"].T
    assert 0.3 < float(out.std()) < 1.5
    assert json.loads((tmp_path / "made" / "config.json").read_text())["hidden_size"] == 512
