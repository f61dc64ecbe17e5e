"""Which cases a check runs, and its files: plan and result."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from opkit.errors import BadInput
from opkit.layers.check.asked import CheckPlan, read_check_plan
from opkit.layers.check.cases import ON_CPU, ON_GPU, Role, cases_of, keeps_cache, sizes_for
from opkit.layers.check.causes import ADVICE
from opkit.layers.check.facts import Seen
from opkit.layers.check.judge import RULES, judge
from opkit.layers.check.result import CheckResult, Line, Outcome, read_check_result
from opkit.layers.op import Case, GemmCase, LaunchMode, MoeCase
from opkit.layers.plan import Plan, plan_from_json
from opkit.layers.registry import OPS, find_op


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
@pytest.mark.parametrize("graphs", [True, False])
def test_the_cases_of_every_op_are_cases_of_a_plan(op: object, graphs: bool) -> None:
    known = find_op(op.name)  # type: ignore[attr-defined]
    asked = cases_of(known, ON_GPU, graphs, keeps_cache(known))
    plan = Plan(known.name, "torch", "m", tuple(item.planned for item in asked), "x.json")
    assert plan_from_json(plan.to_json(), "plan") == plan
    roles = [item.role for item in asked]
    assert (Role.GRAPH in roles) is graphs
    assert (Role.PREFIX in roles) is keeps_cache(known)
    assert {Role.CONTEXT, Role.GENERATION, Role.FIRST, Role.SECOND} <= set(roles)


def test_the_smallest_and_the_large_steps_are_among_them() -> None:
    cases = [item.planned.case for item in cases_of(find_op("gqa"), ON_GPU, True, True)]
    phased = [case for case in cases if isinstance(case, Case)]
    assert min(case.batch * (case.tokens + case.past) for case in phased) == 1
    assert max(case.batch * case.tokens for case in phased) == 4096
    assert max(case.batch for case in phased) == 64


def test_graphs_are_those_of_generation() -> None:
    asked = cases_of(find_op("mla"), ON_GPU, True, True)
    graphs = [item.planned.case for item in asked if item.planned.mode is LaunchMode.GRAPH]
    assert [(case.batch, case.tokens, case.past) for case in graphs] == [(1, 1, 255), (64, 1, 255)]


def test_ops_of_their_own_kind_have_cases_of_it() -> None:
    own = {
        name: [a.planned.case for a in cases_of(find_op(name), ON_CPU, False, False)
               if a.role is Role.OWN]
        for name in ("moe", "gemm", "gqa")
    }  # fmt: skip
    assert own["moe"] == [MoeCase(64), MoeCase(64, "power_law_1.2")]
    assert [case.dtype for case in own["gemm"] if isinstance(case, GemmCase)] == [
        "bfloat16", "float8_e4m3fn",
    ]  # fmt: skip
    assert own["gqa"] == []


def test_an_indexer_asks_for_a_past_beyond_what_it_picks() -> None:
    sizes = sizes_for(True, {"index_topk": 2048})
    assert sizes.past == 2560
    asked = {item.role: item for item in cases_of(find_op("dsa"), sizes, True, True)}
    assert asked[Role.LONG].label() == "generation 1 × 1 @ 2,560"
    assert sizes_for(True, {"index_topk": 16}).past == 0  # fewer than GENERATION has cached
    assert sizes_for(False, {}) == ON_CPU


def test_a_capture_limits_the_cases_to_what_it_holds() -> None:
    sizes = sizes_for(True, {"index_topk": 2048}, {"0": 100, "1": 80})
    assert (sizes.length, sizes.context_batch, sizes.generation_batch, sizes.past) == (80, 2, 2, 0)
    assert sizes_for(True, {"index_topk": 64}, {"0": 100}).past == 0


@pytest.mark.parametrize(("op", "keeps"), [("dsa", True), ("mla", True), ("gqa", True),
                                           ("moe", False), ("gemm", False)])  # fmt: skip
def test_which_ops_keep_a_cache(op: str, keeps: bool) -> None:
    assert keeps_cache(find_op(op)) is keeps


def test_a_plan_comes_back(tmp_path: Path) -> None:
    plan = CheckPlan("gqa", "vllm", "m", "r.json", ("--a", "b"), 2, 3, "captured", "c")
    plan.write(tmp_path / "plan.json")
    assert read_check_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "x"}, "not a plan of schema"),
        ({"inputs": "guessed"}, "inputs must be one of"),
        ({"tp_size": 0}, "tp_size must be"),
        ({"size": 1}, "unknown field size"),
    ],
)
def test_a_wrong_plan_is_one_sentence(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "plan.json"
    CheckPlan("gqa", "vllm", "m", "r.json").write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInput, match=said):
        read_check_plan(path)
    path.write_text("[")
    with pytest.raises(BadInput, match="no readable plan"):
        read_check_plan(path)


RESULT = CheckResult(
    "gqa", "vllm", "cuda",
    lines=(Line("forward", Outcome.PASS, "ran", numbers={"a": {"x": math.nan, "y": 1.0}}),),
    complete=True,
)  # fmt: skip


def test_a_result_comes_back_and_is_json(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    RESULT.write(path)
    data = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert (data["schema"], data["passed"]) == ("opkit.check/1", True)
    assert data["lines"][0]["numbers"] == {"a": {"x": "nan", "y": 1.0}}
    again = read_check_result(path)
    assert again.lines[0].outcome is Outcome.PASS
    assert replace(again, lines=()) == replace(RESULT, lines=())
    assert [found.name for found in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "opkit.check/2", "lines": []}'])
def test_a_file_that_is_no_result_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(BadInput, match="no readable result"):
        read_check_result(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("outcomes", "complete", "passed"),
    [
        ([Outcome.PASS, Outcome.NOT_APPLICABLE], True, True),
        ([Outcome.PASS], False, False),
        ([Outcome.PASS, Outcome.FAIL], True, False),
        ([Outcome.PASS, Outcome.NOT_RUN], True, False),
        ([Outcome.NOT_APPLICABLE], True, False),
        ([], True, False),
    ],
)
def test_it_has_passed_when_nothing_failed_and_something_ran(
    outcomes: list[Outcome], complete: bool, passed: bool
) -> None:
    lines = tuple(Line("rule", outcome, "") for outcome in outcomes)
    assert replace(RESULT, lines=lines, complete=complete).passed is passed


def test_every_rule_has_its_cause_and_its_fix() -> None:
    assert set(ADVICE) == set(RULES)
    assert all(cause and fix for cause, fix in ADVICE.values())


@pytest.mark.parametrize("op", OPS)
def test_before_anything_ran_nothing_has_passed(op: str) -> None:
    known = find_op(op)
    asked = cases_of(known, ON_GPU, True, keeps_cache(known))
    seen = Seen(op, "vllm", "cuda", "tokens", keeps_cache(known), (), (), asked)
    lines = judge(seen)
    assert {line.outcome for line in lines} <= {Outcome.NOT_RUN, Outcome.NOT_APPLICABLE}
    absent = {line.check for line in lines if line.outcome is Outcome.NOT_APPLICABLE}
    assert absent <= {"KV cache present", "KV cache written", "KV cache read", "collected cases"}
