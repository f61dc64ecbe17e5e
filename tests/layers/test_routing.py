"""Which experts tokens are sent to."""

from __future__ import annotations

import numpy as np
import pytest

from opkit.errors import BadInput
from opkit.layers.moe.routing import assign

# DeepSeek-V3, Qwen3-30B-A3B, Mixtral: experts, top-k, groups, groups of a token.
ROUTERS = [(256, 8, 1, 1), (256, 8, 8, 4), (128, 8, 1, 1), (8, 2, 1, 1)]
TOKENS = (1, 2, 7, 64, 1000)
EXPONENTS = (0.0, 1.0, 1.01, 1.2)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("router", ROUTERS)
def test_experts_of_a_token_are_distinct(
    router: tuple[int, int, int, int], tokens: int, exponent: float
) -> None:
    experts, topk, groups, topk_groups = router
    found = assign(tokens, experts, topk, exponent, 3, groups, topk_groups)
    assert found.shape == (tokens, topk)
    assert found.min() >= 0
    assert found.max() < experts
    assert all(len(set(row)) == topk for row in found.tolist())
    chosen = [len(set(row)) for row in (found // (experts // groups)).tolist()]
    assert set(chosen) == {topk_groups} or groups == 1


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("router", ROUTERS)
def test_balanced(router: tuple[int, int, int, int], tokens: int) -> None:
    experts, topk, groups, topk_groups = router
    found = assign(tokens, experts, topk, 0.0, 0, groups, topk_groups)
    counts = np.bincount(found.ravel(), minlength=experts)
    assert counts.max() - counts.min() <= (1 if groups == 1 else 2)


def shares(exponent: float, experts: int = 256) -> list[float]:
    """The share of places of the busiest tenth of the experts, for some seeds."""
    found = []
    for seed in range(20):
        counts = np.bincount(assign(4096, experts, 8, exponent, seed).ravel(), minlength=experts)
        found.append(float(np.sort(counts)[-experts // 10 :].sum() / counts.sum()))
    return found


def test_a_larger_exponent_is_less_even() -> None:
    # Steeper laws have fewer popular experts, which then hold more of the whole.
    balanced, mild, steep = (float(np.mean(shares(a))) for a in (0.0, 1.01, 1.2))
    assert balanced == pytest.approx(26 / 256, rel=0.01)
    assert 0.4 < mild < steep


def test_popularities_follow_the_law() -> None:
    # With exponent 1 every doubling between least and most holds equally many experts. Few enough
    # places a token that no expert reaches the limit, enough that rounding does not show.
    tokens, experts, topk = 2**14, 2**11, 2**7
    doublings = np.log2(0.8 * tokens)
    counts = np.bincount(assign(tokens, experts, topk, 1.0, 0).ravel(), minlength=experts)
    one = counts.mean() * np.log(0.8 * tokens) / (0.8 * tokens - 1)  # places of popularity 1
    found = [np.mean((counts >= 2**i * one) & (counts < 2 ** (i + 1) * one)) for i in range(4, 13)]
    assert found == pytest.approx([1 / doublings] * 9, rel=0.3)


def test_the_most_popular_have_every_token_at_most() -> None:
    # Two places a token and two very popular experts: nothing may spill over.
    found = assign(100, 3, 2, 5.0, 0)
    counts = np.bincount(found.ravel(), minlength=3)
    assert counts.max() <= 100
    assert counts.sum() == 200


def test_seeds_differ_and_repeat() -> None:
    assert (assign(64, 128, 8, 1.2, 0) == assign(64, 128, 8, 1.2, 0)).all()
    assert (assign(64, 128, 8, 1.2, 0) != assign(64, 128, 8, 1.2, 1)).any()


@pytest.mark.parametrize(
    "sizes",
    [(0, 8, 2, 0.0, 0), (4, 8, 9, 0.0, 0), (4, 8, 3, 0.0, 0, 4, 2), (4, 9, 2, 0.0, 0, 2, 1),
     (4, 8, 4, 0.0, 0, 8, 2), (4, 8, 2, 0.0, 0, 2, 4)],
)  # fmt: skip
def test_impossible_sizes(sizes: tuple[int, int, int, float, int]) -> None:
    with pytest.raises(BadInput, match="cannot"):
        assign(*sizes)
