"""Range texts: the contract between the mock process and ``align``."""

from __future__ import annotations

import pytest

from opkit.layers.op import Case, LaunchMode, MockRange, Phase, parse_mock_range

RANGES = [
    MockRange("dsa", Case(Phase.CONTEXT, 1, 4096, 0), LaunchMode.EAGER, 0),
    MockRange("dsa", Case(Phase.CONTEXT, 2, 64, 300), LaunchMode.EAGER, 3, "strict"),
    MockRange("mla", Case(Phase.GENERATION, 16, 1, 1029), LaunchMode.GRAPH, 19),
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
    ],
)
def test_other_texts_are_no_range(text: str) -> None:
    assert parse_mock_range(text) is None


def test_labels_are_for_readers() -> None:
    assert Case(Phase.CONTEXT, 4, 1024, 0).label() == "4 × 1,024"
    assert Case(Phase.GENERATION, 16, 1, 1029).label() == "16 × 1 @ 1,029"
