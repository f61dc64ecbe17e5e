"""The moe table's rows: what their time is of, and where experts stand in a model."""

from __future__ import annotations

import pytest

from opkit.layers.manifest import Manifest
from opkit.layers.moe import MOE, columns, experts_path, from_the_first
from opkit.layers.op import MoeCase


@pytest.mark.parametrize(
    ("includes", "module"),
    [
        ("", "experts"),
        ("gate", "experts, gate"),
        ("gate, shared experts", "experts, gate, shared experts"),
    ],
)
def test_a_row_says_what_else_ran_inside_the_module(includes: str, module: str) -> None:
    mock = Manifest(
        side="mock",
        model={
            "hidden_size": 2048, "inter_size": 768, "topk": 8, "num_experts": 128,
            "includes": includes,
        },
        dtypes={"weights": "bfloat16"},
        tp_size=4,
    )  # fmt: skip
    row = columns(MoeCase(64, "power_law_1.2"), mock)
    assert row["module"] == module
    assert row["moe_tp_size"] == 4
    assert row["inter_size"] == 768  # the model's, not the rank's
    assert row["distribution"] == "power_law_1.2"
    assert list(row) == list(MOE.table(MoeCase(64)).columns)


def test_the_first_layer_is_given_experts() -> None:
    config = {"first_k_dense_replace": 3, "mlp_only_layers": [0], "hidden_size": 64}
    assert from_the_first(config) == {"first_k_dense_replace": 0, "mlp_only_layers": []}
    assert from_the_first({"hidden_size": 64}) == {}


def test_only_mixtral_calls_its_block_otherwise() -> None:
    assert experts_path("MixtralForCausalLM") == "block_sparse_moe.experts"
    assert experts_path("Qwen3MoeForCausalLM") == "mlp.experts"
