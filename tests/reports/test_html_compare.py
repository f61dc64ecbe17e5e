"""The pages of two alignments, and of two collections: as text, and in a real browser."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from html_tables import Reading
from made_collections import h100, h100_rows, hurt, scaled
from test_compare_report import AFTER, BEFORE, aligned, case, upgraded
from test_html_align import TRACES, recorded
from test_html_align_browser import CONTRASTS, OPEN_ALL, TIP, failing

from opkit.align.compare import compare_alignments
from opkit.align.comparison import AlignComparison, comparison_json
from opkit.align.result import AlignResult
from opkit.align.result_json import align_from_json
from opkit.collect.compare import compare_collections
from opkit.collect.comparison import CollectionComparison
from opkit.collect.desk.read import read_collection
from opkit.layers.op import Case, Phase
from opkit.reports.html.collection_text import milliseconds, share
from opkit.reports.html.compare import compare_page
from opkit.reports.html.compare_rows import compare_rows_page

HOSTILE = "evil<script>alert(1)</script>&amp;\"'$x$`</style>"
MOST_BYTES = 350_000
TEXTS = "(table) => [...table.rows].map((row) => [...row.cells].map((c) => c.innerText.trim()))"


def tables_of(page: Page, css: str) -> list[list[list[str]]]:
    """Cells of every table of a class, heads included."""
    found: list[list[list[str]]] = page.run(
        f"[...document.querySelectorAll('table.{css}')].map({TEXTS})"
    )
    return found


@cache
def collected() -> AlignResult:
    text = gzip.decompress((TRACES / "collected" / "dsa-h100-alignment.json.gz").read_bytes())
    return align_from_json(json.loads(text), "the alignment")


@cache
def two_runs() -> AlignComparison:
    """The recording that opkit brings and the run behind the recorded collection: real, one build,
    and a tolerance that has something to show."""
    return compare_alignments(recorded(), collected(), ("bundled", "collected"), 0.03)


@cache
def engine_and_wrong() -> AlignComparison:
    """The bundled run and one whose mock has other norms: kernels come and go."""
    return compare_alignments(recorded(), failing(), ("bundled", "wrong"))


ALIGNMENTS = {"made": upgraded, "two runs": two_runs, "wrong": engine_and_wrong}


@dataclass
class Collections:
    """Two collections on disk, compared, and their page."""

    found: CollectionComparison
    file: Path

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(self.found.to_json()))
        return data


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Collections:
    """The H100's rows, decode of large batches a tenth slower; B has damage and lost four rows."""
    folder = tmp_path_factory.mktemp("compared")
    rows = [
        scaled(row, 0.9) if row.columns["batch_size"] > 16 and "generation" in row.table else row
        for row in h100_rows()
    ]
    after, _ = hurt(folder / "b" / "dsa-vllm")
    before = read_collection(h100(folder / "a" / "dsa-vllm", rows))
    found = compare_collections(before, read_collection(after))
    file = folder / "page.html"
    file.write_text(compare_rows_page(found), "utf-8")
    return Collections(found, file)


@pytest.fixture(params=list(ALIGNMENTS))
def opened(
    request: pytest.FixtureRequest, browser: Browser, tmp_path: Path
) -> Iterator[tuple[Page, dict[str, Any]]]:
    """The page of a comparison, all open, and what `--compare --json` says."""
    found = ALIGNMENTS[request.param]()
    file = tmp_path / "page.html"
    file.write_text(compare_page(found), "utf-8")
    page = browser.open(file)
    page.run(OPEN_ALL)
    yield page, json.loads(json.dumps(comparison_json(found)))
    assert page.errors() == []
    page.close()


def us(ns: int | None, digits: int) -> str:
    return "–" if ns is None else f"{ns / 1000:,.{digits}f}"


def ratio(of: dict[str, Any], digits: int) -> str:
    """``= 1.007 ± 0.002``."""
    if of["ratio"] is None:
        return "–"
    sign = {"steady": "=", "slower": "▲", "faster": "▼"}[of["pace"]]
    spread = "" if of["ratio_spread"] is None else f" ± {of['ratio_spread']:.{digits}f}"
    return f"{sign} {of['ratio']:.{digits}f}{spread}"


def list_row(kernel: dict[str, Any]) -> list[str]:
    """A row of the lists without the word of its change, from the JSON."""
    cells = [str(kernel["position"])]
    for side in ("a", "b"):
        stat = kernel[side] or {}
        cells.append(stat.get("short", ""))
        cells += [us(stat.get(key), 2) for key in ("median_ns", "mad_ns")]
    return [*cells, ratio(kernel, 2)]


def test_the_lists_are_those_of_the_json(opened: tuple[Page, dict[str, Any]]) -> None:
    page, data = opened
    lists = iter(tables_of(page, "lists"))
    cases = [case for phase in data["phases"].values() for case in phase["cases"]]
    for found in cases:
        for side in ("e2e", "mock"):
            rows = next(lists)[1:]
            kernels = found[side]["kernels"]
            assert [[row[0], *row[2:]] for row in rows] == [list_row(k) for k in kernels]
            for row, kernel in zip(rows, kernels, strict=True):
                assert (kernel["change"] in row[1]) == (kernel["change"] != "same")
                assert (kernel["pace"] in row[1]) == (kernel["pace"] != "steady")
    assert next(lists, None) is None
    assert cases


def test_the_shapes_are_those_of_the_json(opened: tuple[Page, dict[str, Any]]) -> None:
    page, data = opened
    tables = tables_of(page, "shapes")
    phases = [phase for phase in data["phases"].values() if phase["cases"]]
    for table, phase in zip(tables, phases, strict=True):
        for row, found in zip(table[1:], phase["cases"], strict=True):
            assert row[0].split(" / ")[0] == found["case"]
            for at, side in ((1, "e2e"), (5, "mock")):
                told = found[side]
                assert row[at : at + 3] == [
                    us(told["gpu_ns_a"], 1), us(told["gpu_ns_b"], 1), ratio(told, 3),
                ]  # fmt: skip
        labels = page.run(
            "[...document.querySelectorAll('svg.chart .mark')].map((m) => m.ariaLabel)"
        )
        for found in phase["cases"]:
            told = found["e2e"]
            assert any(
                f": {us(told['gpu_ns_a'], 1)} → {us(told['gpu_ns_b'], 1)} µs" in label
                and f"B/A {told['ratio']:.3f}" in label
                for label in labels
            )


def test_what_changed_is_marked_by_sign_word_and_class() -> None:
    """GIVEN an upgrade with another tile, a new kernel, a slower one, THEN each row says so."""
    page = Reading(compare_page(upgraded()))
    rows = page.of_class("lists")[0].rows[1:]
    assert [row[1] for row in rows] == [
        "~ other variant, ▼ faster", "=", "+ new", "▲ slower",
    ]  # fmt: skip
    assert [(row[2], row[5]) for row in rows][2] == ("", "indexer_k_quant_and_cache")
    assert [a["class"] for tag, a in page.tags if tag == "tr" and a.get("class")][:4] == [
        "v", "s", "n", "t",
    ]  # fmt: skip
    assert page.text.count("✓ pass → ✗ fail") >= 2
    assert "Only in B: 1 × 8,192" in page.text
    sides = page.of_class("sides")[0]
    assert sides.rows[1] == ["versions vllm", "0.24.0", "0.25.0"]
    wide = page.of_class("wide")[0]
    assert ["+ new", "", "void ns::indexer_k_quant_and_cache<(int)128>(float *)"] in wide.rows


def test_like_runs_say_so() -> None:
    shape = Case(Phase.CONTEXT, 1, 4096, 0)
    runs = [aligned(version, case(shape, BEFORE)) for version in ("0.24.0", "0.25.0")]
    page = Reading(compare_page(compare_alignments(*runs)))
    assert "= no difference" in page.text
    assert "No kernel came, went or was replaced." in page.text
    assert not [a for _, a in page.tags if a.get("id") == "only"]
    assert "The same kernels in the same order, times within the limits." in page.text
    assert not [a for tag, a in page.tags if tag == "details" and "open" in a]


def test_phases_without_a_common_shape_have_no_chart() -> None:
    old, new = (Case(Phase.CONTEXT, 1, tokens, 0) for tokens in (512, 4096))
    found = compare_alignments(aligned("1", case(old, BEFORE)), aligned("1", case(new, AFTER)))
    page = Reading(compare_page(found))
    assert page.of_class("shapes") == []
    assert "Only in A: 1 × 512" in page.text
    assert "Only in B: 1 × 4,096" in page.text


def test_names_are_text_wherever_they_stand() -> None:
    shape = Case(Phase.CONTEXT, 1, 4096, 0)
    evil = (*BEFORE, (HOSTILE, 9.0))
    after = aligned(HOSTILE, case(shape, evil))
    found = compare_alignments(
        aligned("1", case(shape, BEFORE)), replace(after, backend=HOSTILE), (HOSTILE, "b")
    )
    text = compare_page(found)
    assert "<script>alert" not in text
    page = Reading(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert any(HOSTILE in row for row in page.of_class("lists")[0].rows)


def test_the_box_hides_what_did_not_change(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(compare_page(engine_and_wrong()), "utf-8")
    page = browser.open(file)
    seen = "[...document.querySelectorAll('details[open] .lists tbody tr')]" + (
        ".filter((row) => row.checkVisibility()).map((row) => row.className)"
    )
    before = page.run(seen)
    page.run("document.getElementById('only').focus()")
    page.press(" ")
    after = page.run(seen)
    assert "s" in before
    assert after == [name for name in before if name != "s"] != []
    page.run("location.hash = '#generation-1'")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run("document.getElementById('generation-1').open") is True
    page.close()


def check_reading(text: str) -> None:
    """What every page keeps: one h1, headings in order, captions, scopes, no request."""
    page = Reading(text)
    levels = [
        int(tag[1]) for tag, _ in page.tags if len(tag) == 2 and tag[0] == "h" and tag != "hr"
    ]
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    assert all(table.caption for table in page.tables)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        if tag == "th":
            assert attributes.get("scope", "row") in ("col", "row", "colgroup")
        for name in ("src", "href", "xlink:href", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


@pytest.mark.parametrize("kind", list(ALIGNMENTS))
def test_a_page_of_alignments_can_be_read_aloud_and_is_small(kind: str) -> None:
    text = compare_page(ALIGNMENTS[kind]())
    check_reading(text)
    assert len(text.encode()) < MOST_BYTES
    assert compare_page(ALIGNMENTS[kind]()) == text


def test_a_page_of_collections_can_be_read_aloud_and_is_small(collections: Collections) -> None:
    text = collections.file.read_text("utf-8")
    check_reading(text)
    assert len(text.encode()) < MOST_BYTES


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["wrong", "collections"])
def test_a_page_loads_in_silence_and_can_be_read(
    kind: str, dark: bool, browser: Browser, collections: Collections, tmp_path: Path
) -> None:
    file = collections.file
    if kind == "wrong":
        file = tmp_path / "page.html"
        file.write_text(compare_page(engine_and_wrong()), "utf-8")
    page = browser.open(file, dark=dark)
    page.run(OPEN_ALL)
    found = page.run(CONTRASTS)
    assert found["seen"] > 20
    assert found["low"] == []
    assert page.requests() == [file.as_uri()]
    assert page.errors() == []
    page.close()
    narrow = browser.open(file, width=400)
    narrow.run(OPEN_ALL)
    assert narrow.run("document.documentElement.scrollWidth") <= 400
    narrow.close()


def test_the_rows_are_those_of_the_json(collections: Collections, browser: Browser) -> None:
    page = browser.open(collections.file)
    page.run(OPEN_ALL)
    data = collections.data
    shown = sorted(row for table in tables_of(page, "rows") for row in table[1:])
    sign = {"slower": "▲", "faster": "▼", "same": "="}
    wanted = sorted(
        [row["label"], milliseconds(row["latency_ms_a"]), milliseconds(row["latency_ms_b"]),
         f"{sign[row['change']]} {row['ratio']:.3f}", share(row["allowed"]),
         f"{row['times_allowed']:.2f}"]
        for row in data["rows"]
    )  # fmt: skip
    assert [row[:6] for row in shown] == wanted
    assert len(wanted) == 532
    heads = page.run("document.querySelectorAll('tbody th').length")
    roles = [n["role"]["value"] for n in page.ask("Accessibility.getFullAXTree")["nodes"]]
    assert roles.count("rowheader") == heads > 532
    (groups,) = tables_of(page, "groups")
    assert [row[:2] + row[4:] for row in groups[1:]] == [
        [" · ".join(filter(None, (g["table"], g["group"]))) or "all", str(g["rows"]),
         str(g["same"]), *(f"{g[key]:.3f}" for key in ("median", "least", "most"))]
        for g in (*data["groups"], data["overall"])
    ]  # fmt: skip
    # Only what moved beyond its limit is called changed.
    for row in data["rows"]:
        assert (row["times_allowed"] > 1) == (row["change"] != "same")
    page.close()


def test_the_grid_has_a_cell_for_every_row(collections: Collections, browser: Browser) -> None:
    page = browser.open(collections.file)
    cells = page.run(
        "[...document.querySelectorAll('.grid td')].map((c) => [c.className, c.textContent.trim()])"
    )
    data = collections.data
    for change, sign in (("slower", "▲"), ("faster", "▼"), ("same", "")):
        own = sorted(text for css, text in cells if css == change)
        assert own == sorted(f"{sign}{row['ratio']:.2f}" for row in data["rows"]
                             if row["change"] == change)  # fmt: skip
    assert [text for css, text in cells if css == "lost"] == ["−"] * 4
    (alone,) = tables_of(page, "alone")
    assert [row[2] for row in alone[1:]] == [row["why"] for row in data["only_a"]]
    assert "failed: CUDA out of memory: 12 GiB <asked> & not there" in [r[2] for r in alone[1:]]
    page.close()


def test_every_point_says_what_the_json_says(collections: Collections, browser: Browser) -> None:
    page = browser.open(collections.file)
    labels = page.run("[...document.querySelectorAll('svg.chart .mark')].map((m) => m.ariaLabel)")
    data = collections.data
    assert len(labels) == len(data["rows"]) + len(data["only_a"])
    for row in data["rows"]:
        times = f"{milliseconds(row['latency_ms_a'])} → {milliseconds(row['latency_ms_b'])} ms"
        assert any(times in label and f" {row['ratio']:.3f}, same within" in label
                   for label in labels)  # fmt: skip
    assert sum("only in A" in label for label in labels) == 4
    page.run("document.querySelector('svg.chart .mark').focus(); 1")
    first = page.run(TIP)
    page.press("ArrowRight")
    assert page.run(TIP) not in (None, first)
    page.close()


def test_without_scripts_all_numbers_are_there(collections: Collections, browser: Browser) -> None:
    page = browser.open(collections.file, script=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert sum(len(table) - 1 for table in tables_of(page, "rows")) == 532
    assert page.run("document.getElementById('theme').hidden") is True
    page.close()
