"""What a mock sampled in generation says nothing of context; what prefills wrote, decode reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_subject import OPERAND, case_match, checked, not_passed, subject

from opkit.align.policy import Policy
from opkit.layers.op import Case, Phase

ZEROS = {"zeros": 1.0, "distinct": 0.0}


def test_a_degenerate_operand_of_the_other_phase_changes_nothing() -> None:
    made = subject(operands=(OPERAND, replace(OPERAND, name="generation o_proj.input", **ZEROS)))
    assert made.cases[0].e2e.case.phase is Phase.CONTEXT
    assert not_passed(made) == {}
    assert checked(made)["data"].detail.startswith("1 operands sampled, none degenerate; ")


@pytest.mark.parametrize("name", ["context o_proj.input", "o_proj.weight"])
def test_one_of_this_phase_and_weights_count(name: str) -> None:
    made = subject(operands=(OPERAND, replace(OPERAND, name=name, **ZEROS)))
    assert not_passed(made) == {"data": "fail"}
    assert checked(made)["data"].detail.startswith(f"{name} ")


def test_a_phase_of_which_nothing_was_sampled_is_inconclusive() -> None:
    made = subject(operands=(replace(OPERAND, name="generation o_proj.input"),))
    assert not_passed(made) == {"data": "inconclusive"}


def test_limits_of_ones_own_are_told_beside_what_they_let_pass() -> None:
    made = subject(
        operands=(replace(OPERAND, **ZEROS),), policy=Policy(max_zeros=1.0, min_distinct=0.0)
    )
    assert "none degenerate by a policy of your own" in checked(made)["data"].detail


@pytest.mark.parametrize("name", ["context o_proj.input", "generation o_proj.input"])
def test_decode_is_judged_by_both_for_it_reads_what_prefills_wrote(name: str) -> None:
    decode = {"case": Case(Phase.GENERATION, 1, 1, 1024)}
    case = case_match(mock=decode, e2e=decode)
    made = subject(case, operands=(OPERAND, replace(OPERAND, name=name, **ZEROS)))
    assert not_passed(made) == {"data": "fail"}
