"""The page of a collection in a real browser: it loads, asks for nothing, and its numbers are those
of the JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, browser
from made_collections import desk, h100, h100_rows, hurt, powered, shipped_table, write_collection
from made_rows import about, failed_row, grid

from opkit.collect.desk.desk import Desk
from opkit.collect.desk.desk_json import desk_json
from opkit.collect.work import Fault
from opkit.reports.html.collection import FLAGS, collection_page
from opkit.reports.html.collection_text import milliseconds, share, short_number, times

__all__ = ["browser"]
MOST_BYTES = 400_000  # of the page of 536 rows
COLUMNS = {
    "latency_ms": "latency ms", "bound_ms": "roofline ms", "shipped_ms": "shipped ms",
    "elapsed_ms": "elapsed ms", "gpu_ms": "GPU ms",
}  # fmt: skip


@dataclass
class Written:
    """A page on disk, and what it was made from."""

    file: Path
    desk: Desk
    keys: dict[str, str]

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """The JSON's points, by key."""
        data = json.loads(json.dumps(desk_json(self.desk)))
        return {
            point["key"]: point
            for table in data["tables"]
            for group in table["groups"]
            for panel in group["panels"]
            for point in panel["points"]
        }


def write(folder: Path, found: Desk, keys: dict[str, str] | None = None) -> Written:
    file = folder / "page.html"
    file.write_text(collection_page(found), "utf-8")
    return Written(file, found, keys or {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The H100's 536 rows beside a shipped table."""
    folder = tmp_path_factory.mktemp("page")
    rows = [row for row in h100_rows() if row.table == "dsa_generation_module"]
    beside = shipped_table(folder / "dsa_generation_module_perf.parquet", rows, factor=1.25)
    return write(folder, desk(h100(folder / "dsa-vllm"), beside))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("page")
    made, keys = hurt(folder / "dsa-vllm")
    return write(folder, desk(made), keys)


def table_rows(page: Page) -> dict[str, dict[str, str]]:
    """The cells of every row of numbers, by key and by their column's head (the first, of two)."""
    found: dict[str, dict[str, str]] = page.run(
        """Object.fromEntries([...document.querySelectorAll("table.numbers tr[id]")].map((row) => {
          const texts = (row) => [...row.cells].map((cell) => cell.textContent);
          const [heads, cells] = [texts(row.closest("table").tHead.rows[0]), texts(row)];
          const own = {};
          heads.forEach((head, at) => { own[head] ??= cells[at].trim(); });
          return [row.id, own];
        }))"""
    )
    return found


def labels(page: Page) -> list[str]:
    found: list[str] = page.run(
        """[...document.querySelectorAll("svg.chart .mark")]
           .map((mark) => mark.getAttribute("aria-label"))"""
    )
    return found


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_loads_and_asks_for_nothing(whole: Written, browser: Browser, dark: bool) -> None:
    page = browser.open(whole.file, dark=dark)
    assert page.errors() == []
    assert page.requests() == [whole.file.as_uri()]
    # Nothing is cut off at the right.
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_a_narrow_window_scrolls_tables_and_not_the_page(
    whole: Written, damaged: Written, browser: Browser
) -> None:
    for written in (whole, damaged):
        page = browser.open(written.file, width=400)
        page.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
        assert page.run("document.documentElement.scrollWidth") <= 400
        page.close()


def test_the_page_of_536_rows_is_small(whole: Written) -> None:
    text = whole.file.read_text()
    assert len(text.encode()) < MOST_BYTES
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", text)


def test_every_number_of_the_json_is_in_a_table(whole: Written, browser: Browser) -> None:
    page = browser.open(whole.file)
    rows, points = table_rows(page), whole.points
    assert rows.keys() == points.keys()
    assert len(rows) == 536
    for key, point in points.items():
        cells = rows[key]
        for name, head in COLUMNS.items():
            if head in cells:
                assert cells[head] == milliseconds(point[name]), (key, head)
        assert cells["±"] == share(point["interval"])
        assert cells["n"] == f"{point['spread']['count']}"
        for head, name in (("least", "least"), ("lower q.", "lower"), ("upper q.", "upper"),
                           ("most", "most")):  # fmt: skip
            assert cells[head] == milliseconds(point["spread"][name])
        assert cells["×"] == times(point["over_bound"]).removesuffix(" ×")
        assert cells["SM MHz"] == f"{point['after']['sm_mhz']:,}"
        assert cells["flags"].split() == point["flags"]
    page.close()


def test_without_scripts_all_numbers_are_there(whole: Written, browser: Browser) -> None:
    """Tips are made by a script, from the tables: without it the tables still hold every number."""
    page = browser.open(whole.file, script=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    rows, points = table_rows(page), whole.points
    assert {key: cells["latency ms"] for key, cells in rows.items()} == {
        key: milliseconds(point["latency_ms"]) for key, point in points.items()
    }
    throttled = 8  # their tips are of the drawing of clocks, which has no table of its own
    assert sum(label is not None for label in labels(page)) < len(points) // 2 + throttled
    page.close()


def test_every_point_can_be_hovered_and_says_what_the_json_says(
    whole: Written, browser: Browser
) -> None:
    page = browser.open(whole.file)
    tips = labels(page)
    points = whole.points
    throttled = [tip for tip in tips if re.search(r"\nthrottled(:| \()", tip)]
    assert len(throttled) == 8
    said = [tip.splitlines() for tip in tips if tip not in throttled]
    assert len(said) == len(points) == 536
    for point, lines in zip(points.values(), said, strict=True):
        assert f": {milliseconds(point['latency_ms'])} ms, ±{share(point['interval'])}" in lines[0]
        assert lines[1].startswith(f"{point['spread']['count']} ")
        assert lines[2].startswith(f"{times(point['over_bound'])} the least possible ")
        for flag in point["flags"]:
            assert any(flag in line for line in lines)
    # 1.25 times our own times were given as the shipped ones.
    assert (
        sum(any(line.startswith("0.800 × the shipped") for line in lines) for lines in said) == 184
    )
    page.close()


def test_a_chart_is_walked_by_arrow_keys_along_its_curves(whole: Written, browser: Browser) -> None:
    page = browser.open(whole.file)
    page.run("""document.querySelector("#t1 svg.chart .mark").focus(); 1""")
    assert page.run("document.getElementById('tip').textContent").startswith("batch 1 · step 2:")
    page.press("ArrowRight")
    assert page.run("document.getElementById('tip').textContent").startswith("batch 1 · step 4:")
    page.press("End")
    assert page.run("document.getElementById('tip').textContent").startswith("batch 1,024 · step")
    page.close()


def test_the_grid_has_a_sign_for_every_case(damaged: Written, browser: Browser) -> None:
    page = browser.open(damaged.file)
    cells = page.run(
        """[...document.querySelectorAll("table.grid td")].map((cell) =>
           [cell.className, cell.textContent.trim(), cell.title])"""
    )
    by_class: dict[str, list[list[str]]] = {}
    for name, *rest in cells:
        by_class.setdefault("measured" if re.fullmatch(r"s\d", name) else name, []).append(rest)
    assert len(by_class["measured"]) == 532
    assert by_class["failed"] == [
        [
            "✗",
            "batch 4 · 512: failed: out of memory: CUDA out of memory: 12 GiB <asked> & not there",
        ]
    ]
    assert [sign for sign, _ in by_class["left_out"]] == ["⊘"]
    assert [sign for sign, _ in by_class["not_run"]] == ["○"]
    assert [sign for sign, _ in by_class["not_written"]] == ["◌"]
    # A letter for each flag, whatever the colour: 4,096 new tokens of one request are a spike.
    assert ["3.7p", "batch 1 · 4,096: spike"] in by_class["measured"]
    page.close()


def test_what_has_no_row_and_what_stands_out_is_told(damaged: Written, browser: Browser) -> None:
    page = browser.open(damaged.file)
    text = page.run("document.body.innerText")
    assert "◐ partial" in text
    assert "4 cases without a row" in text
    assert "1 measured row is in no table" in text
    lost = page.run("document.getElementById('lost').innerText")
    assert lost.count("dsa_context_module") == 4
    assert "heads 128 · step 0 · batch 4 · isl 512" in lost
    outliers = page.run("document.getElementById('t0').innerText").split("Outliers")[1]
    assert "spike: 12.2025 ms at isl 4096; its neighbours at 3072 and 6144" in outliers
    # The outlier is drawn as a cross beneath its dot.
    assert any("spike: 12.2025" in tip for tip in labels(page))
    power = page.run("document.getElementById('power').innerText")
    assert "dsa_generation_module" in power
    assert any(
        tip.startswith("batch 16 · step 4,096: 512.2 W of 700 W\n0.1875 J") for tip in labels(page)
    )
    assert page.errors() == []
    page.close()


def test_failures_alone_are_a_page_with_a_grid(tmp_path: Path, browser: Browser) -> None:
    failed = [failed_row(batch, 512, 0, Fault.CUDA, "illegal access") for batch in (1, 2)]
    folder = write_collection(tmp_path / "c", [], about(), loose=failed)
    page = browser.open(write(tmp_path, desk(folder)).file)
    assert page.errors() == []
    signs = page.run(
        "[...document.querySelectorAll('table.grid td')].map((c) => c.innerText.trim())"
    )
    assert signs == ["✗", "✗"]
    assert "NVIDIA H100 80GB HBM3 · 0 rows in 1 table · 2 cases without a row" in page.run(
        "document.querySelector('header').innerText"
    )
    page.close()


def test_a_waiver_stands_at_the_top(tmp_path: Path) -> None:
    waived = about(waiver="no <GPU> to align on", differences=("no verdict admits it",))
    folder = write_collection(tmp_path / "c", [powered(row) for row in grid()], waived)
    text = collection_page(desk(folder))
    top = text.split("<main")[0]
    assert "! waived" in top
    assert "Waived: no &lt;GPU&gt; to align on" in top
    assert "admitted by" not in top
    assert "Every row is flagged waived." in text
    assert "no verdict admits it" in text


def test_every_panel_of_a_chart_is_told_to_who_cannot_see_it(
    whole: Written, browser: Browser
) -> None:
    page = browser.open(whole.file)
    names = page.run("[...document.querySelectorAll('svg.chart')].map((c) => c.ariaLabel)")
    what = "latency against isl: new tokens of each request"
    assert names[:4] == [
        f"dsa_context_module · heads {heads} · step {step}: {what}"
        for heads in (16, 128)
        for step in (0, 128)
    ]
    unnamed = page.run(
        "[...document.querySelectorAll('table th')].filter((th) => !th.scope).length"
        " + document.querySelectorAll('img:not([alt])').length"
    )
    assert unnamed == 0
    page.close()


def test_letters_of_flags_differ() -> None:
    letters = [letter for letter, _ in FLAGS.values()]
    assert len(set(letters)) == len(letters)


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0.2087654, "0.2088"), (36.9187, "36.92"), (1234.6, "1,235"), (0.0093451, "0.009345"),
     (1.0, "1.000"), (999.96, "1,000"), (None, "–")],
)  # fmt: skip
def test_milliseconds_have_four_digits(ms: float | None, text: str) -> None:
    assert milliseconds(ms) == text


def test_large_sizes_are_short_where_they_are_round() -> None:
    assert [short_number(n) for n in (4096, 65536, 131072, 8388608, 100000, "half")] == [
        "4,096", "64 Ki", "128 Ki", "8 Mi", "100,000", "half",
    ]  # fmt: skip
