"""gqa of plain torch against dense attention in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

import torch_reference as reference  # noqa: E402
from torch_small import LLAMA, MIXTRAL, build, context, generation, plan, run  # noqa: E402

from opkit.layers.op import Case, LaunchMode  # noqa: E402
from opkit.layers.plan import PlannedCase  # noqa: E402

CASES = [
    context(1, 1),
    context(2, 13),
    context(3, 4, 9),
    context(1, 6, 2),
    generation(1, 1),
    generation(3, 3),
    generation(2, 17),
]
ONE_HEAD_EACH = LLAMA | {"num_key_value_heads": 4}
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def windowed(size: int) -> dict[str, Any]:
    return MIXTRAL | {"sliding_window": size}


def expected(mock: Any, case: Case) -> Any:
    """The new tokens' outputs, from whole requests computed anew."""
    length = case.past + case.tokens
    found = []
    for request in range(case.batch):
        whole = mock.arguments(mock.rows.rows(range(request, request + 1), 0, length))
        window = mock.geometry.sliding_window
        found.append(reference.grouped_attention(**whole, window=window)[case.past :])
    return torch.cat(found)


@pytest.mark.parametrize("inputs", ["tokens", "normal"])
@pytest.mark.parametrize(
    "config",
    [LLAMA, ONE_HEAD_EACH, windowed(5), windowed(1), windowed(12)],
    ids=["grouped", "one head each", "window 5", "window 1", "window 12"],
)
@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_attention_is_the_definitions(
    tmp_path: Path, case: Case, config: dict[str, Any], inputs: str
) -> None:
    mock = build(plan(tmp_path, "gqa", config, case, inputs=inputs))
    torch.testing.assert_close(run(mock, case), expected(mock, case), **TIGHT)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    case = context(2, 13)
    mock = build(plan(tmp_path, "gqa", LLAMA, case), None)
    exact = build(plan(tmp_path, "gqa", LLAMA, case))
    found = run(mock, case)
    assert found.dtype is torch.bfloat16
    whole = {name: value.double() for name, value in mock.inputs.items()}
    exact.prepare(PlannedCase(case, LaunchMode.EAGER))
    for name, value in whole.items():
        exact.inputs[name] = value
    # Inputs, shares and outputs of about 1, kept in 8 bits.
    torch.testing.assert_close(found.double(), exact.launch(), rtol=0.0, atol=0.03)


@pytest.mark.parametrize("config", [LLAMA, windowed(4)], ids=["all", "window"])
def test_generation_goes_on_where_context_ends(tmp_path: Path, config: dict[str, Any]) -> None:
    whole, chunk, step = context(2, 12), context(2, 5, 7), generation(2, 11)
    mock = build(plan(tmp_path, "gqa", config, whole, chunk, step))
    outputs = [run(mock, case).view(2, case.tokens, -1) for case in (whole, chunk, step)]
    torch.testing.assert_close(outputs[1], outputs[0][:, 7:], **TIGHT)
    torch.testing.assert_close(outputs[2], outputs[0][:, 11:], **TIGHT)


def test_the_window_bounds_what_is_read(tmp_path: Path) -> None:
    case = generation(2, 9)
    mock = build(plan(tmp_path, "gqa", windowed(4), case))
    before = run(mock, case)
    (cache,) = mock.probe().caches
    assert cache.past == (6, 7, 8, 16, 17, 18)  # the 4th is the token itself
    assert cache.new == (9, 19)
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    cache.tensor[[0, 5, 10, 15]] = 100.0
    assert torch.equal(forward(), before)
    cache.tensor[6] = 100.0
    assert not torch.equal(forward()[0], before[0])


def test_the_operands_are_what_is_multiplied(tmp_path: Path) -> None:
    case = generation(4, 9)
    mock = build(plan(tmp_path, "gqa", LLAMA, case, context(4, 30)))
    found = {item.name: item for item in mock.operands(PlannedCase(case, LaunchMode.EAGER))}
    assert list(found) == [
        "generation query",
        "generation key",
        "generation value",
        "generation kv_cache",
    ]
    assert found["generation query"].shape == (4, 4, 16)
    assert found["generation kv_cache"].shape == (36, 2, 2, 16)
    assert all(item.zeros == 0.0 and item.equal_rows == 0.0 for item in found.values())
