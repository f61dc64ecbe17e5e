"""Checkpoints as transformers reads them; where it and torch are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import small

from opkit.layers.checkpoint import plan_checkpoint, write_checkpoint

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
transformers = pytest.importorskip("transformers", reason="no transformers: make test-torch")


def deepseek_v3() -> dict[str, Any]:
    config = {k: v for k, v in small("deepseek-v32").items() if not k.startswith("index_")}
    return config | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": small("qwen3"),
    "qwen3-moe": small("qwen3-moe"),
    "mixtral": small("mixtral"),
    "llama": small("llama"),
    "qwen2": small("qwen3", architectures=["Qwen2ForCausalLM"], model_type="qwen2", head_dim=64),
    "deepseek-v3": deepseek_v3(),
    "glm": small(
        "deepseek-v32", architectures=["GlmMoeDsaForCausalLM"], model_type="glm_moe_dsa",
        n_group=1, topk_group=1, rope_scaling=None, mlp_layer_types=["dense", "dense", "sparse"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_finds_its_place_and_states_keep_their_scale(
    name: str, tmp_path: Path
) -> None:
    config = MODELS[name] | {"hidden_size": 256}
    write_checkpoint(plan_checkpoint(config, name, dtype="float32"), tmp_path / "made")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", output_loading_info=True, dtype=torch.float32
    )
    assert {key: value for key, value in told.items() if value} == {}
    ids = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    assert torch.isfinite(found.logits).all()
    assert all(0.9 < float(states.std()) < 2.0 for states in found.hidden_states)
    # Tokens stay different from one another: a router can tell them apart.
    likeness = torch.corrcoef(found.hidden_states[-2][0]).fill_diagonal_(0)
    assert float(likeness.mean()) < 0.25
