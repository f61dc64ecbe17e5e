"""The plan: what goes in comes out, and nonsense is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import EXIT_BAD_INPUT, BadInput
from opkit.layers.op import Phase
from opkit.layers.plan import Plan, plan_from_json, read_plan


def one_case(**changes: Any) -> list[dict[str, Any]]:
    """A list of one case, with some fields replaced."""
    case = {"phase": "generation", "batch": 1, "tokens": 1, "past": 7, "mode": "graph"}
    return [case | changes]


LEAST: dict[str, Any] = {
    "schema": "opkit.plan/1",
    "op": "dsa",
    "backend": "vllm",
    "model": "model",
    "cases": one_case(),
    "manifest": "mock.opkit.json",
}


def changed(**changes: Any) -> str:
    """The least plan's JSON with some fields replaced or added."""
    return json.dumps(LEAST | changes)


def test_round_trip(dsa_plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    dsa_plan.write(path)
    assert read_plan(path) == dsa_plan


def test_only_what_is_needed_must_be_given() -> None:
    plan = plan_from_json(json.dumps(LEAST), "plan.json")
    assert (plan.warmup, plan.iterations, plan.tp_size, plan.strict) == (5, 20, 1, False)


def test_pause_is_per_phase_in_seconds(dsa_plan: Plan) -> None:
    assert dsa_plan.pause_s(Phase.CONTEXT) == pytest.approx(0.05)
    assert dsa_plan.pause_s(Phase.GENERATION) == pytest.approx(0.0025)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a plan"),
        (changed(schema="opkit.plan/0"), "not a plan"),
        (changed(colour="red"), "unknown field colour"),
        ('{"schema": "opkit.plan/1"}', "not a readable plan"),
        (changed(cases=[]), "no cases"),
        (changed(cases=3), "not a readable plan"),
        (changed(cases=one_case(phase="prefill")), "prefill"),
        (changed(cases=one_case(mode="lazy")), "lazy"),
        (changed(cases=one_case(batch=0)), "at least 1"),
        (changed(cases=one_case(batch="4")), "at least 1"),
        (changed(cases=one_case(tokens=2)), "one new token"),
        (changed(cases=one_case(past=0)), "past of at least 1"),
        (changed(iterations=0), "iterations"),
        (changed(warmup=True), "warmup"),
        (changed(seed=-1), "seed"),
        (changed(tp_size=1.5), "tp_size"),
        (changed(context_pause_ms=-1), "context_pause_ms"),
        (changed(generation_pause_ms="long"), "generation_pause_ms"),
        (changed(strict="yes"), "strict"),
        (changed(inputs="zeros"), "inputs"),
        (changed(engine_args=[8192]), "must be text"),
        (changed(model=None), "must be text"),
    ],
)
def test_nonsense_is_one_sentence(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        plan_from_json(text, "plan.json")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert str(caught.value).startswith("plan.json: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot be read"):
        read_plan(tmp_path / "none.json")
