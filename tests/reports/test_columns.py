"""What becomes of names that are longer than their column: none looks like another."""

from __future__ import annotations

import io

import pytest
from made_result import kernel
from rich.console import Console
from rich.text import Text
from test_compare_report import DECODE, aligned, case, render

from opkit.align.compare import compare_alignments
from opkit.reports.columns import Column, middles, table

TILE = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT"


def cut(*names: str, width: int) -> list[str]:
    return [cell.plain for cell in middles([Text(name) for name in names], width)]


def test_a_long_name_loses_its_middle_and_keeps_what_differs_at_its_ends() -> None:
    """GIVEN two tiles that differ in their last letters, THEN both are one line and differ."""
    assert cut(TILE, TILE.replace("TNT", "NNT"), "[memset]", width=34) == [
        "nvjet_sm90_tst_25…2_h_bz_coopA_TNT",
        "nvjet_sm90_tst_25…2_h_bz_coopA_NNT",
        "[memset]",
    ]


def test_names_that_differ_in_what_would_be_cut_are_folded() -> None:
    """GIVEN tiles that differ in their middle, THEN each stands in full, over two lines."""
    other = TILE.replace("128_64x4", "192_64x3")
    first, second, third = cut(TILE, other, "BatchQKApplyRotaryPosIdsCosSinCacheKernel", width=30)
    for name, told in ((TILE, first), (other, second)):
        lines = told.split("\n")
        assert len(lines) == 2
        assert max(map(len, lines)) <= 30
        assert lines[0] + lines[1].removeprefix("  ") == name
        assert lines[0].endswith("_")
    assert third == "BatchQKApplyRot…SinCacheKernel"


def test_a_second_name_is_held_against_the_first() -> None:
    """What stands before a name (`→ `, `mock: `) tells two names apart in no reader's eye."""
    other = TILE.replace("128_64x4", "192_64x3")
    (both,) = cut(f"{TILE}\n→ {other}", width=35)
    assert "…" not in both
    assert both.replace("\n  ", "") == f"{TILE}\n→ {other}"
    (same,) = cut(f"{TILE}\n→ {TILE}", width=35)
    assert same.count("…") == 2


@pytest.mark.parametrize("width", range(6, 60))
def test_no_line_is_wider_than_asked(width: int) -> None:
    names = [TILE, TILE.replace("128", "192"), f"→ {TILE.replace('64x4', '64x5')}", "k" * 70]
    for told in cut(*names, width=width):
        assert max(map(len, told.split("\n"))) <= width


def test_styles_stay() -> None:
    (cell,) = middles([Text(TILE, style="bold") + Text("\nmock: x", style="dim")], 30)
    assert cell.plain.endswith("\nmock: x")
    assert {span.style for span in cell.spans} == {"bold", "dim"}


def test_a_table_stays_in_its_width() -> None:
    names = [TILE, TILE.replace("128_64x4", "192_64x3")]
    columns = [
        Column("kernel", [Text(name) for name in names], flexible=True),
        Column("µs", [Text("1.0")] * 2, True),
    ]
    made = table(columns, 40)
    screen = io.StringIO()
    Console(file=screen, width=40).print(made)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert sum("_64x" in line or "64x" in line for line in lines) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_a_comparison_tells_two_long_kernels_apart(width: int) -> None:
    """GIVEN two kernels of 60 letters that differ in the middle only, WHEN both became slower,
    THEN no two rows of the terminal's table are the same name."""
    long = [f"nvjet_sm90_tst_{'x' * 18}_{tile}_{'y' * 30}_TNN" for tile in ("256x128", "192x176")]
    before, after = (case(DECODE, tuple((name, us) for name in long)) for us in (100.0, 300.0))
    text = render(compare_alignments(aligned("0.24.0", before), aligned("0.25.0", after)), width)
    rows = text.split("side  change")[1].split("DIFFERENT")[0]
    for tile in ("256x128", "192x176"):
        assert tile in rows
    assert max(map(len, text.splitlines())) <= width
    assert kernel(long[0], 1.0).short == long[0]
