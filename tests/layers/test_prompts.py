"""Prompts: the same on both sides of an alignment, different from one another."""

from __future__ import annotations

from opkit.layers.prompts import prompt_tokens


def test_the_same_everywhere() -> None:
    # Literal values: another Python version or platform must send the same prompt.
    assert prompt_tokens(0, 0, 6, 129280) == FIRST
    assert prompt_tokens(0, 0, 6, 129280) == prompt_tokens(0, 0, 6, 129280)


def test_a_longer_prompt_begins_with_the_shorter() -> None:
    assert prompt_tokens(3, 1, 4096, 129280)[:1024] == prompt_tokens(3, 1, 1024, 129280)


def test_seed_and_request_both_matter() -> None:
    prompts = {tuple(prompt_tokens(seed, r, 32, 1000)) for seed in range(4) for r in range(4)}
    assert len(prompts) == 16


def test_ids_fill_the_vocabulary() -> None:
    assert set(prompt_tokens(0, 0, 2000, 10)) == set(range(10))
    assert prompt_tokens(0, 0, 0, 10) == []


FIRST = [68859, 30370, 35462, 115498, 437, 3793]
