"""What is asked of an estimate so that it reads a collected row."""

from __future__ import annotations

from typing import Any

import pytest
from made_rows import (
    dsa_row,
    grid,
)

from opkit.collect.install.questions import Asked, Question, questions
from opkit.collect.work import Row
from opkit.errors import BadInput


def table_rows(rows: list[Row]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.table, []).append({**row.columns, "latency": 1.0})
    return found


def value_of(question: Question, option: str) -> str:
    return question.arguments[question.arguments.index(option) + 1]


def test_both_phases_are_asked_for_by_one_estimate_at_a_shape_that_both_have() -> None:
    context, generation = questions(table_rows(grid()), Asked())
    assert context.arguments == generation.arguments
    assert context.row is not None
    assert generation.row is not None
    batch, isl = int(value_of(context, "--batch-size")), int(value_of(context, "--isl"))
    assert (context.row["batch_size"], context.row["isl"], context.row["step"]) == (batch, isl, 0)
    assert (generation.row["batch_size"], generation.row["step"]) == (batch, isl)
    assert value_of(context, "--model-path") == "deepseek-ai/DeepSeek-V3.2"
    assert value_of(context, "--osl") == "2"


@pytest.mark.parametrize(("heads", "ranks"), [(128, "1"), (16, "8"), (1, "128")])
def test_the_ranks_follow_from_the_heads_of_a_row(heads: int, ranks: str) -> None:
    rows = table_rows([dsa_row(1, 1024, 0, 1.0, heads=heads)])
    (question,) = questions(rows, Asked())
    assert value_of(question, "--tp-size") == value_of(question, "--moe-ep-size") == ranks


def test_dtypes_and_a_cached_prefix_follow_from_the_row() -> None:
    rows = table_rows([dsa_row(4, 1024, 128, 1.0)])
    rows["dsa_context_module"][0] |= {"gemm_type": "fp8_block", "kv_cache_dtype": "fp8"}
    (question,) = questions(rows, Asked())
    assert value_of(question, "--gemm-quant-mode") == "fp8_block"
    assert value_of(question, "--kvcache-quant-mode") == "fp8"
    assert value_of(question, "--fmha-quant-mode") == "bfloat16"
    assert (value_of(question, "--isl"), value_of(question, "--prefix")) == ("1152", "128")


def test_the_user_s_shape_is_asked_for_and_its_row_looked_up() -> None:
    rows = table_rows([*grid(), dsa_row(2, 1024, 0, 1.0, heads=16)])
    found = questions(rows, Asked(isl=1024, batch_size=2, tp_size=8))[0]
    assert found.row is not None
    assert found.row["num_heads"] == 16
    lost = questions(rows, Asked(isl=1000, model_path="/m", more=("--nextn", "1")))[0]
    assert lost.row is None
    assert value_of(lost, "--isl") == "1000"
    assert value_of(lost, "--model-path") == "/m"
    assert lost.arguments[-2:] == ("--nextn", "1")


def test_an_architecture_without_a_known_model_must_be_named() -> None:
    rows = table_rows([dsa_row(1, 1024, 0, 1.0)])
    rows["dsa_context_module"][0]["architecture"] = "NewForCausalLM"
    with pytest.raises(BadInput, match="NewForCausalLM"):
        questions(rows, Asked(model_path="/model"))
    (question,) = questions(rows, Asked(model_path="/model", tp_size=4))
    assert value_of(question, "--tp-size") == "4"
    with pytest.raises(BadInput, match="no estimate that asks for moe"):
        questions({"moe": [{}]}, Asked())
