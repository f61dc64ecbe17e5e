"""moe of plain torch against a loop over tokens in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

import torch_reference as reference  # noqa: E402
from torch_small import DEEPSEEK, MIXTRAL, build, context, generation, plan, run  # noqa: E402

from opkit.errors import BadInput  # noqa: E402
from opkit.layers.graphs import CaptureFailed  # noqa: E402
from opkit.layers.moe.routing import assign  # noqa: E402
from opkit.layers.op import GemmCase, LaunchMode, MoeCase  # noqa: E402
from opkit.layers.plan import PlannedCase  # noqa: E402

NO_BIAS = DEEPSEEK | {"topk_method": "group_limited_greedy", "scoring_func": "softmax"}
NO_NORM = DEEPSEEK | {"norm_topk_prob": False}
MODELS = {
    "softmax": MIXTRAL,
    "grouped sigmoid": DEEPSEEK,
    "grouped softmax": NO_BIAS,
    "no norm": NO_NORM,
}

# Of the largest output: bfloat16 keeps 8 bits, three times in a row.
BFLOAT16 = 2**-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", [context(2, 9), generation(3, 5), context(1, 1)])
def test_experts_are_the_definitions(tmp_path: Path, name: str, case: Any) -> None:
    mock = build(plan(tmp_path, "moe", MODELS[name], case))
    found = run(mock, case)
    exact = reference.experts(mock, mock.inputs["hidden_states"])
    assert found.abs().max() > 0.05
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_one_grouped_product_gives_the_same(tmp_path: Path, name: str, dtype: str) -> None:
    case = context(3, 11)
    mock = build(plan(tmp_path, "moe", MODELS[name], case), dtype)
    if not mock.module.experts.grouped:
        pytest.skip("this torch has no grouped product")
    grouped = run(mock, case)
    mock.module.experts.grouped = False
    alone = mock.launch()
    atol = alone.abs().max().item() * (1e-5 if dtype == "float32" else BFLOAT16)
    torch.testing.assert_close(grouped, alone, rtol=0.0, atol=atol)
    exact = reference.experts(mock, mock.inputs["hidden_states"].double())
    torch.testing.assert_close(grouped.double(), exact, rtol=0.0, atol=atol)


def test_experts_without_tokens_are_passed_over(tmp_path: Path) -> None:
    case = context(1, 1)
    mock = build(plan(tmp_path, "moe", MIXTRAL, case), "bfloat16")
    found = run(mock, case)
    exact = reference.experts(mock, mock.inputs["hidden_states"].double())
    torch.testing.assert_close(
        found.double(), exact, rtol=0.0, atol=BFLOAT16 * exact.abs().max().item()
    )


@pytest.mark.parametrize("routing", ["balanced", "power_law_1.2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_driven_router_picks_what_was_assigned(tmp_path: Path, name: str, routing: str) -> None:
    case = MoeCase(64, routing)
    mock = build(plan(tmp_path, "moe", MODELS[name], case), "bfloat16")
    found = run(mock, case)
    shape = mock.geometry.experts
    exponent = 0.0 if routing == "balanced" else 1.2
    choice = assign(64, shape.number, shape.topk, exponent, 0, shape.groups, shape.topk_groups)
    picked = mock.module.router(mock.inputs["hidden_states"])[1]
    assert [set(row) for row in picked.tolist()] == [set(row) for row in choice.tolist()]
    counts = picked.flatten().bincount(minlength=shape.number)
    assert (counts.max() - counts.min() <= 2) == (routing == "balanced")
    exact = reference.experts(mock, mock.inputs["hidden_states"].double())
    torch.testing.assert_close(
        found.double(), exact, rtol=0.0, atol=BFLOAT16 * exact.abs().max().item()
    )
    probe = mock.probe()
    assert probe.shape == tuple(found.shape) == (64, 48)
    assert probe.caches == ()
    assert probe.inputs["hidden_states"] is mock.inputs["hidden_states"]
    assert f"{routing}: " in mock.describe().recipe["routing"]


def test_the_router_is_the_whole_models_on_every_rank(tmp_path: Path) -> None:
    case = context(1, 7)
    mock = build(plan(tmp_path, "moe", DEEPSEEK, case, tp_size=2))
    assert mock.module.experts.down_proj.shape == (16, 48, 12)
    assert mock.module.router.weight.shape == (16, 48)
    described = mock.describe()
    assert described.model["inter_size"] == 24  # the model's; the table divides it
    assert described.model["includes"] == "gate"
    assert described.dtypes["kv_cache"] == "none"
    assert any("shared experts are left out" in note for note in described.notes)
    exact = reference.experts(mock, mock.rows.rows(range(1), 0, 7))
    torch.testing.assert_close(run(mock, case), exact, rtol=0.0, atol=1e-12)


def test_what_it_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no case like"):
        build(plan(tmp_path, "moe", MIXTRAL, GemmCase(8, 8, 8)))
    with pytest.raises(BadInput, match="balanced or power_law"):
        build(plan(tmp_path, "moe", MIXTRAL, MoeCase(8, "alphabetical")))
    mock = build(plan(tmp_path, "moe", MIXTRAL, context(1, 2)))
    assert "one after another" in mock.graph_obstacle()  # float64 has no grouped product
    if not torch.cuda.is_available():
        with pytest.raises(CaptureFailed, match="no CUDA graphs"):
            mock.prepare(PlannedCase(context(1, 2), LaunchMode.GRAPH))


def test_a_router_that_misses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = MoeCase(16)
    mock = build(plan(tmp_path, "moe", MIXTRAL, case))
    monkeypatch.setattr(
        "opkit.layers.moe.torch.steer", lambda gate, *_, **__: torch.ones(16, gate.shape[1])
    )
    with pytest.raises(BadInput, match="tokens would go to other experts"):
        run(mock, case)


def test_the_operands_hold_the_experts(tmp_path: Path) -> None:
    large = MIXTRAL | {"hidden_size": 512, "intermediate_size": 160}
    case = context(4, 8)
    mock = build(plan(tmp_path, "moe", large, case), "bfloat16")
    found = {item.name: item for item in mock.operands(PlannedCase(case, LaunchMode.EAGER))}
    assert found["experts.gate_up_proj.weight"].shape == (8 * 320, 512)
    assert all(item.zeros < 0.01 and item.equal_rows == 0.0 for item in found.values())
    assert found["context router.input"].shape == found["context experts.input"].shape == (32, 512)
    assert found["context experts.weights"].shape == (32, 2)
