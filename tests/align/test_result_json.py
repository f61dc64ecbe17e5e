"""The JSON form: exact, stable, and read back without loss."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from made_result import made_result

from opkit.align.result import AlignResult, KernelShare
from opkit.align.result_json import SCHEMA, align_from_json, align_json
from opkit.errors import BadInput


def through_json(result: AlignResult) -> Any:
    return json.loads(json.dumps(align_json(result)))


def test_round_trip_loses_nothing() -> None:
    result = made_result()
    assert align_from_json(through_json(result)) == result


def test_cases_of_one_shape_stay_apart() -> None:
    result = made_result()
    phase = result.phases[0]
    twice = dataclasses.replace(phase, cases=(phase.cases[0], phase.cases[1], phase.cases[0]))
    doubled = dataclasses.replace(result, phases=(twice,))
    assert align_from_json(through_json(doubled)) == doubled
    names = [case["case"] for case in align_json(doubled)["phases"]["context"]["cases"]]
    assert names == ["1 × 4,096", "4 × 1,024", "1 × 4,096 #2"]


def test_the_keys_are_what_scripts_rely_on() -> None:
    data = through_json(made_result())
    assert list(data) == ["schema", "op", "backend", "verdict", "phases", "provenance", "notes"]
    assert (data["schema"], data["verdict"]) == ("opkit.align/1", "fail")
    context = data["phases"]["context"]
    assert list(data["phases"]) == ["context", "generation"]
    assert list(context) == [
        "verdict", "method", "attributed", "explained", "checks", "cases", "kernels", "notes",
    ]  # fmt: skip
    assert context["explained"] == 0.6124
    assert context["checks"][2] == {
        "check": "data",
        "outcome": "inconclusive",
        "detail": "topKPerRowPrefill takes 97 µs against 657 µs at the same grid",
        "kernels": [],
        "cause": "its time depends on the values",
        "next_step": "capture the engine's activations",
    }
    assert context["cases"][1]["mock"]["case"] == {
        "phase": "context", "batch": 4, "tokens": 1024, "past": 0,
    }  # fmt: skip
    assert context["kernels"][4] == {
        "case": "1 × 4,096",
        "position": 5,
        "mock": None,
        "e2e": {
            "name": "void ns::indexer_k_quant_and_cache<(int)128>(float *)",
            "short": "indexer_k_quant_and_cache",
            "family": "other",
            "grid": [132, 1, 1],
            "block": [256, 1, 1],
            "calls": 24,
            "median_ns": 4200,
            "min_ns": 4100,
            "max_ns": 4600,
            "mad_ns": 42,
            "offset_ns": None,
        },
        "level": "e2e only",
        "key": True,
        "glue": False,
        "share": 0.001,
        "ratio": None,
    }
    assert context["kernels"][0]["ratio"] == pytest.approx(812.4 / 918.2)


def test_what_an_older_opkit_stored_is_read() -> None:
    data = through_json(made_result())
    for phase in data["phases"].values():
        for case in phase["cases"]:
            for key in ("steps", "unattributed", "outside"):
                del case[key]
            for side in ("mock", "e2e"):
                del case[side]["samples_ns"]
        for row in phase["kernels"]:
            for side in ("mock", "e2e"):
                if row[side]:
                    del row[side]["offset_ns"]
    assert align_from_json(data) == made_result()


def test_samples_and_what_ran_beside_the_op_come_back() -> None:
    result = made_result()
    phase = result.phases[0]
    case = dataclasses.replace(
        phase.cases[0],
        mock=dataclasses.replace(phase.cases[0].mock, samples_ns=(5_866_000, 5_866_400)),
        steps=4,
        unattributed=(KernelShare("lost", 2, 1_500, 0.001),),
        outside=(KernelShare("fused_moe_kernel", 8, 900_000, 0.3),),
    )
    changed = dataclasses.replace(result, phases=(dataclasses.replace(phase, cases=(case,)),))
    assert align_from_json(through_json(changed)) == changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "opkit.align/2"}, f"not an alignment report of schema {SCHEMA}"),
        ({"verdict": "maybe"}, "damaged"),
        ({"phases": {"context": {}}}, "damaged"),
        ({"phases": None}, "damaged"),
    ],
)
def test_other_data_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        align_from_json(through_json(made_result()) | change, "x.json")
    assert str(caught.value).startswith("x.json: ")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("phases", "context", "cases", 0, "mock", "gpu_ns"), "fast"),
        (("phases", "context", "cases", 0, "mock", "gpu_ns"), None),
        (("phases", "context", "cases", 0, "attributed"), float("nan")),
        (("phases", "context", "cases", 0, "mock", "samples_ns"), [1, "x"]),
        (("phases", "context", "kernels", 0, "share"), float("inf")),
        (("phases", "context", "kernels", 0, "mock", "short"), 7),
        (("phases", "context", "kernels", 0, "mock", "grid"), [1, 2]),
        (("provenance", "versions"), "0.24.0"),
        (("provenance", "files"), ["trace"]),
        (("provenance", "notes"), [None]),
    ],
)
def test_a_number_that_is_none_is_a_damaged_report(place: tuple[Any, ...], value: Any) -> None:
    data = through_json(made_result())
    *path, last = place
    part = data
    for step in path:
        part = part[step]
    part[last] = value
    with pytest.raises(BadInput, match="damaged alignment report"):
        align_from_json(data)
