"""Range texts: the contract between the mock process and ``align``."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from opkit.layers.op import (
    AnyCase,
    Case,
    GemmCase,
    LaunchMode,
    MockRange,
    MoeCase,
    Phase,
    case_from_json,
    parse_mock_range,
)

RANGES = [
    MockRange("dsa", Case(Phase.CONTEXT, 1, 4096, 0), LaunchMode.EAGER, 0),
    MockRange("dsa", Case(Phase.CONTEXT, 2, 64, 300), LaunchMode.EAGER, 3, "strict"),
    MockRange("mla", Case(Phase.GENERATION, 16, 1, 1029), LaunchMode.GRAPH, 19),
    MockRange("gemm", GemmCase(4096, 16384, 7168), LaunchMode.GRAPH, 4),
    MockRange("gemm", GemmCase(1, 2, 3, "float8_e4m3fn"), LaunchMode.EAGER, 0),
    MockRange("moe", MoeCase(4096, "power_law_1.2"), LaunchMode.EAGER, 7),
    MockRange("moe", MoeCase(1), LaunchMode.GRAPH, 0),
]


@pytest.mark.parametrize("marked", RANGES)
def test_round_trip(marked: MockRange) -> None:
    assert parse_mock_range(marked.text()) == marked


@pytest.mark.parametrize(
    "text",
    [
        "",
        "opkit dsa",
        "execute_context_1(4096)_generation_0(0)",
        RANGES[0].text() + " and more",
        RANGES[0].text().replace("eager", "lazy"),
        RANGES[0].text().replace("b=1", "b=one"),
        RANGES[3].text().replace(" k=7168", ""),
        RANGES[3].text().replace("m=4096", "m=-1"),
        RANGES[5].text().replace("experts", "product"),
        RANGES[5].text().replace("routing=power_law_1.2", "routing="),
        RANGES[5].text().replace("experts", "context"),
    ],
)
def test_other_texts_are_no_range(text: str) -> None:
    assert parse_mock_range(text) is None


def test_labels_are_for_readers() -> None:
    assert Case(Phase.CONTEXT, 4, 1024, 0).label() == "4 × 1,024"
    assert Case(Phase.GENERATION, 16, 1, 1029).label() == "16 × 1 @ 1,029"
    assert Case(Phase.GENERATION, 16, 1, -1).label() == "16 × 1 @ ?"
    assert GemmCase(4096, 16384, 7168).label() == "4,096 × 16,384 × 7,168 bfloat16"
    assert MoeCase(4096, "power_law_1.2").label() == "4,096 power_law_1.2"


@pytest.mark.parametrize("case", sorted({marked.case for marked in RANGES}, key=str), ids=str)
def test_a_case_comes_back_from_its_json(case: AnyCase) -> None:
    assert case_from_json(asdict(case)) == case


@pytest.mark.parametrize(
    "item",
    [{}, {"m": 1, "n": 2, "k": 3}, {"routing": "balanced"}, {"phase": "decode", "batch": 1}],
)
def test_an_incomplete_case_is_none(item: dict[str, object]) -> None:
    with pytest.raises((KeyError, ValueError)):
        case_from_json(item)
