"""Activations that a router picks given experts from. Needs torch."""

from __future__ import annotations

from typing import Any

import pytest

from opkit.errors import BadInput
from opkit.layers.moe.routing import assign, steer

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")


def gate(experts: int, hidden: int, dtype: Any = None, seed: int = 0) -> Any:
    """A router's weight as models draw it."""
    stream = torch.Generator().manual_seed(seed)
    return (torch.randn(experts, hidden, generator=stream) * 0.02).to(dtype or torch.bfloat16)


def picked(scores: Any, topk: int) -> list[set[int]]:
    return [set(row) for row in scores.topk(topk, dim=1).indices.tolist()]


@pytest.mark.parametrize("exponent", [0.0, 1.2])
@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 8), (128, 8)])
def test_softmax_router(experts: int, topk: int, exponent: float) -> None:
    weight = gate(experts, 512)
    choice = assign(300, experts, topk, exponent, 0)
    hidden = steer(weight, choice, 0, torch)
    assert hidden.shape == (300, 512)
    assert hidden.dtype == torch.bfloat16
    logits = hidden.float() @ weight.float().T
    assert picked(logits, topk) == [set(row) for row in choice.tolist()]
    # As the engine has them, with logits in its own element type.
    assert picked(hidden @ weight.T, topk) == [set(row) for row in choice.tolist()]


def test_activations_stay_close_to_normal() -> None:
    weight = gate(64, 2048)
    hidden = steer(weight, assign(256, 64, 8, 1.2, 0), 0, torch).float()
    assert abs(float(hidden.std()) - 1.0) < 0.05
    assert abs(float(hidden.mean())) < 0.02
    assert float((hidden.abs() < 1.0).float().mean()) == pytest.approx(0.683, abs=0.02)
    # No two tokens alike, also where they go to the same experts.
    same = steer(weight, [[1, 2]] * 16, 0, torch).float()
    likeness = torch.corrcoef(same) - torch.eye(16)
    assert float(likeness.abs().max()) < 0.2


def test_weights_of_a_token_are_not_all_equal() -> None:
    weight = gate(64, 1024)
    choice = assign(64, 64, 8, 0.0, 0)
    logits = steer(weight, choice, 0, torch).float() @ weight.float().T
    best = torch.softmax(logits, dim=1).topk(8, dim=1).values
    assert float((best[:, 0] / best[:, 7]).median()) > 1.5


@pytest.mark.parametrize("deviation", [0.0, 0.01, 0.1])
def test_sigmoid_router_with_a_bias_and_groups(deviation: float) -> None:
    experts, topk, groups, topk_groups = 64, 8, 8, 4
    weight = gate(experts, 512)
    bias = torch.randn(experts, generator=torch.Generator().manual_seed(1)) * deviation
    choice = assign(200, experts, topk, 1.2, 0, groups, topk_groups)
    hidden = steer(weight, choice, 0, torch, scoring="sigmoid", bias=bias, groups=groups,
                   topk_groups=topk_groups)  # fmt: skip
    # The router of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), written out.
    scores = torch.sigmoid(hidden.float() @ weight.float().T) + bias
    best = scores.view(-1, groups, 8).topk(2, dim=2).values.sum(dim=2)
    kept = torch.zeros_like(best).scatter_(1, best.topk(topk_groups, dim=1).indices, 1.0)
    scores = scores.masked_fill(kept.repeat_interleave(8, dim=1) == 0, float("-inf"))
    assert picked(scores, topk) == [set(row) for row in choice.tolist()]


def test_groups_without_a_bias_are_chosen_by_their_best() -> None:
    weight = gate(16, 256)
    choice = assign(100, 16, 4, 0.0, 0, 4, 2)
    hidden = steer(weight, choice, 0, torch, groups=4, topk_groups=2)
    # The router of DeepSeek-V2 (arXiv:2405.04434, section 2.2.2).
    scores = torch.softmax(hidden.float() @ weight.float().T, dim=1)
    best = scores.view(-1, 4, 4).amax(dim=2)
    kept = torch.zeros_like(best).scatter_(1, best.topk(2, dim=1).indices, 1.0)
    scores = scores.masked_fill(kept.repeat_interleave(4, dim=1) == 0, 0.0)
    assert picked(scores, 4) == [set(row) for row in choice.tolist()]


def test_what_is_checked_is_what_is_given() -> None:
    # A router in float32 before activations in bfloat16: rounded first, checked then.
    weight, choice = gate(32, 128, torch.float32), assign(500, 32, 4, 0.0, 0)
    hidden = steer(weight, choice, 0, torch, dtype=torch.bfloat16)
    assert hidden.dtype == torch.bfloat16
    assert picked(hidden.float() @ weight.T, 4) == [set(row) for row in choice.tolist()]
    assert steer(weight, choice, 0, torch).dtype == torch.float32


def test_the_engines_dummy_weights_can_be_steered_too() -> None:
    # vLLM's: uniform in ±1e-3.
    stream = torch.Generator().manual_seed(0)
    weight = ((torch.rand(128, 1024, generator=stream) - 0.5) * 2e-3).to(torch.bfloat16)
    choice = assign(50, 128, 8, 0.0, 0)
    hidden = steer(weight, choice, 0, torch)
    assert picked(hidden.float() @ weight.float().T, 8) == [set(row) for row in choice.tolist()]


def test_seeds_decide() -> None:
    weight, choice = gate(8, 64), assign(4, 8, 2, 0.0, 0)
    assert torch.equal(steer(weight, choice, 0, torch), steer(weight, choice, 0, torch))
    assert not torch.equal(steer(weight, choice, 0, torch), steer(weight, choice, 1, torch))


def test_more_tokens_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opkit.layers.moe.routing._CHUNK", 16)
    weight, choice = gate(8, 64), assign(50, 8, 2, 0.0, 0)
    logits = steer(weight, choice, 0, torch).float() @ weight.float().T
    assert picked(logits, 2) == [set(row) for row in choice.tolist()]


def test_what_cannot_be_reached_is_told() -> None:
    # All experts share one weight: no activation tells them apart.
    weight = gate(1, 64).expand(8, 64)
    with pytest.raises(BadInput, match="5 of 5 tokens would go to other experts"):
        steer(weight, assign(5, 8, 2, 0.0, 0), 0, torch)
    # One expert's bias is above any other's score: only tokens that want it have their way.
    bias = torch.zeros(8)
    bias[3] = 100.0
    choice = [[0, 1], [3, 4], [5, 6]]
    with pytest.raises(BadInput, match="2 of 3 tokens"):
        steer(gate(8, 64), choice, 0, torch, scoring="sigmoid", bias=bias)
    with pytest.raises(BadInput, match="unknown scoring"):
        steer(gate(8, 64), choice, 0, torch, scoring="tanh")
