"""The plan: what goes in comes out, and nonsense is one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import EXIT_BAD_INPUT, BadInput
from opkit.layers.op import GemmCase, LaunchMode, MoeCase, Phase
from opkit.layers.plan import INPUTS, Plan, PlannedCase, parse_routing, plan_from_json, read_plan


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
        (changed(inputs="ones"), "inputs must be one of tokens, normal, captured, zeros, rows"),
        (changed(inputs="captured"), "captured inputs need the folder"),
        (changed(captured="folder"), "captured inputs need the folder"),
        (changed(inputs="captured", captured=3), "must be text"),
        (changed(layer=-1), "layer must be a whole number of at least 0"),
        (changed(layer=True), "layer"),
        (changed(layer="3"), "layer"),
        (
            changed(cases=[{"m": 0, "n": 1, "k": 1, "dtype": "bfloat16", "mode": "graph"}]),
            "at least 1",
        ),
        (changed(cases=[{"m": 1, "n": 1, "dtype": "bfloat16", "mode": "graph"}]), "not a readable"),
        (changed(cases=[{"tokens": 0, "routing": "balanced", "mode": "graph"}]), "at least 1"),
        (changed(cases=[{"tokens": 8, "routing": "even", "mode": "graph"}]), "not 'even'"),
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


@pytest.mark.parametrize("inputs", INPUTS)
def test_every_recipe_of_inputs_comes_back(dsa_plan: Plan, tmp_path: Path, inputs: str) -> None:
    folder = "there" if inputs == "captured" else ""
    given = replace(dsa_plan, inputs=inputs, captured=folder, layer=3)
    given.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == given


def test_cases_of_products_and_experts_come_back(dsa_plan: Plan, tmp_path: Path) -> None:
    cases = (
        PlannedCase(GemmCase(4, 5, 6, "float8_e4m3fn"), LaunchMode.EAGER),
        PlannedCase(MoeCase(7, "power_law_1.2"), LaunchMode.GRAPH),
        *dsa_plan.cases,
    )
    given = replace(dsa_plan, cases=cases)
    given.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == given


@pytest.mark.parametrize(
    ("text", "exponent"),
    [("balanced", 0.0), ("power_law_1", 1.0), ("power_law_1.2", 1.2), ("power_law_0.01", 0.01)],
)
def test_routing_is_read(text: str, exponent: float) -> None:
    assert parse_routing(text) == exponent


@pytest.mark.parametrize(
    "text",
    ["", "even", "power_law", "power_law_", "power_law_0", "power_law_0.0", "power_law_-1",
     "power_law_1.", "power_law_1.2 ", "power_law_1e3", "Balanced", 1.2, None],
)  # fmt: skip
def test_no_routing(text: Any) -> None:
    with pytest.raises(
        BadInput, match=r"sweep\.toml: routing is balanced or power_law_A"
    ) as caught:
        parse_routing(text, "sweep.toml")
    assert repr(text) in str(caught.value)
