"""Prompts: the same on both sides of an alignment, different from one another."""

from __future__ import annotations

import pytest

from opkit.layers.manifest import Answer, answer_from_json
from opkit.layers.op import Case, Phase
from opkit.layers.prompts import Sequences, prompt_tokens


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


VOCAB = 50
SHORT = Answer(4, ((91, 92, 93), (94, 95, 96)))
LONG = Answer(8, ((97, 98, 99),) * 4)


def decode(batch: int, past: int) -> Case:
    return Case(Phase.GENERATION, batch, 1, past)


def test_a_decode_step_is_given_what_the_engine_answered() -> None:
    # The engine's first answered token comes out of the prompt's own step, and goes into the first
    # decode step: at 4 cached tokens of a prompt of 4.
    known = Sequences(7, VOCAB, (LONG, SHORT))
    known.select(decode(2, 5))
    prompts = [prompt_tokens(7, request, 4, VOCAB) for request in range(2)]
    assert known.tokens(0, 6) == [*prompts[0], 91, 92]
    assert known.tokens(1, 6) == [*prompts[1], 94, 95]
    assert known.tokens(0, 5) == [*prompts[0], 91]
    assert known.tokens(0, 3) == prompts[0][:3]
    # After the answer's end it goes on as a longer prompt does.
    assert known.tokens(0, 9)[7:] == prompt_tokens(7, 0, 9, VOCAB)[7:]


@pytest.mark.parametrize(
    "case",
    [
        decode(2, 7),  # after the answer's end
        decode(3, 5),  # more requests than that wave had
        decode(2, 3),  # amid the prompt
        Case(Phase.CONTEXT, 2, 1, 5),
    ],
)
def test_other_steps_are_given_prompts(case: Case) -> None:
    known = Sequences(7, VOCAB, (SHORT,))
    known.select(decode(2, 5))
    assert known.tokens(0, 6)[4:] == [91, 92]
    known.select(case)
    assert known.tokens(0, 6) == prompt_tokens(7, 0, 6, VOCAB)


def test_the_wave_of_a_case_is_the_smallest_that_fits() -> None:
    known = Sequences(7, VOCAB, (LONG, Answer(8, ((81, 82, 83),) * 2)))
    known.select(decode(2, 9))
    assert known.tokens(1, 10)[8:] == [81, 82]
    known.select(decode(3, 9))
    assert known.tokens(1, 10)[8:] == [97, 98]


def test_an_answer_is_read_back_from_text() -> None:
    assert SHORT.to_json() == {"prompt": 4, "tokens": ["91 92 93", "94 95 96"]}
    assert answer_from_json(SHORT.to_json()) == SHORT
    with pytest.raises(ValueError, match="invalid literal"):
        answer_from_json({"prompt": 4, "tokens": ["91 x"]})
