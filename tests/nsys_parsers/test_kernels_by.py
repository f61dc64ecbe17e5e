"""Kernels grouped by family or short name: held against sums of the export itself."""

from __future__ import annotations

import gzip
import io
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opkit.nsys_parsers.names import load_families, parse_name
from opkit.nsys_parsers.reading import Reading
from opkit.nsys_parsers.table import open_table
from opkit.nsys_parsers.views.kernels import kernels_view
from opkit.nsys_parsers.views.view import Selection, answer
from opkit.reports.trace import print_kernels

RECORDED = Path(__file__).parents[2] / "opkit" / "recorded" / "dsa-vllm-h100-e2e.sqlite.gz"
NAMED = """SELECT s.value, sum(k.end - k.start) FROM CUPTI_ACTIVITY_KIND_KERNEL k
JOIN StringIds s ON s.id = k.demangledName GROUP BY 1"""
Row = dict[str, Any]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("by") / "e2e.sqlite"
    with gzip.open(RECORDED, "rb") as packed, file.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return file


@pytest.fixture(scope="module")
def sums(export: Path) -> Iterator[dict[tuple[str, str], int]]:
    """Nanoseconds by family and short name, as sqlite sums them."""
    table, found = load_families(None), defaultdict[tuple[str, str], int](int)
    with sqlite3.connect(export) as db:
        for name, total in db.execute(NAMED):
            parsed = parse_name(name, table)
            found[parsed.family, parsed.short] += total
    yield found
    db.close()


def listed(export: Path, level: str) -> tuple[list[Row], Row]:
    with open_table([export], Reading(use_cache=False)) as table:
        view = kernels_view(table, Selection(), level)
        columns, rows = answer(table, view)
        return [dict(zip(columns, row, strict=True)) for row in rows], view.about


def test_a_family_names_the_kernel_that_takes_most_of_it(
    export: Path, sums: dict[tuple[str, str], int]
) -> None:
    rows, _ = listed(export, "family")
    families = defaultdict[str, dict[str, int]](dict)
    for (family, short), total in sums.items():
        families[family][short] = total
    assert {row["name"]: row["total_ns"] for row in rows} == {
        family: sum(kernels.values()) for family, kernels in families.items()
    }
    wanted = {family: max(kernels, key=kernels.__getitem__) for family, kernels in families.items()}
    assert {row["name"]: row["short"] for row in rows} == wanted
    # Or any kernel of the family would do.
    assert wanted != {family: min(kernels) for family, kernels in families.items()}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_what_is_grouped_by_stays_at_any_width(
    width: int, export: Path, sums: dict[tuple[str, str], int]
) -> None:
    for level, keys in (("family", {f for f, _ in sums}), ("short", {s for _, s in sums})):
        rows, about = listed(export, level)
        console = Console(file=io.StringIO(), width=width, color_system=None)
        print_kernels(rows, about, 0, console, level=level)
        assert isinstance(console.file, io.StringIO)
        drawn = console.file.getvalue()
        whole = {key for key in keys if len(key) < 20}
        assert len(whole) > 5
        assert {key for key in whole if key not in drawn} == set()
        head = drawn.splitlines()[0]
        assert ("family" if level == "family" else "kernel") in head
        assert all(len(line) <= width for line in drawn.splitlines())
