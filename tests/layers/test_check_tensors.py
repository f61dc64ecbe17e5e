"""Parts of a cache are changed and put back, whatever type the cache has."""

from __future__ import annotations

import pytest

from opkit.layers.check.tensors import Blocks, same_bits

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_stirred_blocks_hold_large_finite_values_of_either_sign(name: str) -> None:
    cache = torch.randn(4, 8, 16).to(getattr(torch, name))
    before = cache.clone()
    blocks = Blocks(cache, [1, 3])
    assert blocks.stir()
    stirred = cache[[1, 3]].float()
    assert torch.isfinite(stirred).all()
    assert stirred.abs().min() >= 256
    assert 0.3 < (stirred > 0).float().mean() < 0.7
    assert same_bits(cache[[0, 2]], before[[0, 2]])
    blocks.restore()
    assert same_bits(cache, before)


def test_bytes_that_hold_values_beside_scales_are_not_stirred() -> None:
    cache = torch.arange(32, dtype=torch.uint8).reshape(4, 8)
    before = cache.clone()
    assert not Blocks(cache, [0]).stir()
    assert same_bits(cache, before)
