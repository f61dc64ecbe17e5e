"""The page of an alignment, read as text: nothing here needs a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from html_tables import Reading
from made_result import made_result
from made_timed import timed_result

from opkit.align.judge import Question, judge
from opkit.align.result import AlignResult, CheckResult, Outcome, PhaseResult
from opkit.align.result_json import align_json
from opkit.layers.op import Phase
from opkit.layers.registry import find_op
from opkit.reports.html.align import align_page

RECORDED = Path(__file__).parents[2] / "opkit" / "recorded"
TRACES = Path(__file__).parents[1] / "traces"
GOAL_BYTES = 300_000
NOTHING = "–"


@cache
def recorded() -> AlignResult:
    mock, e2e = (RECORDED / f"dsa-vllm-h100-{side}.sqlite.gz" for side in ("mock", "e2e"))
    return judge(Question(find_op("dsa"), mock, (e2e,)))


@cache
def recorded_page() -> str:
    return align_page(recorded(), name="dsa-20261121-103000-ab12cd")


def nothing_compared() -> AlignResult:
    check = CheckResult(
        "evidence", Outcome.INCONCLUSIVE, "no region on either side", cause="c", next_step="n"
    )
    phase = PhaseResult(Phase.CONTEXT, Outcome.INCONCLUSIVE, None, 0.0, (), (check,))
    return AlignResult("dsa", "vllm", Outcome.INCONCLUSIVE, (phase,))


PAGES = {
    "recorded": recorded_page,
    "made": lambda: align_page(timed_result()),
    "older": lambda: align_page(made_result()),
    "nothing": lambda: align_page(nothing_compared()),
}
every_page = pytest.mark.parametrize("kind", list(PAGES))


def us(ns: int | None, digits: int = 2) -> str:
    return NOTHING if ns is None else f"{ns / 1000:,.{digits}f}"


def expected_rows(phase: dict[str, Any], case: str) -> list[list[str]]:
    """The kernel table of a case as the JSON has it, without columns that are no numbers."""
    rows = []
    for row in (row for row in phase["kernels"] if row["case"] == case):
        cells = [str(row["position"])]
        for kernel in (row["mock"], row["e2e"]):
            if kernel is None:
                cells += [NOTHING] * 4
                continue
            cells += [us(kernel[key]) for key in ("offset_ns", "median_ns", "mad_ns")]
            cells.append(f"{us(kernel['min_ns'])}–{us(kernel['max_ns'])}")
        cells.append(NOTHING if row["ratio"] is None else f"{row['ratio']:.2f}")
        cells.append(f"{100 * row['share']:.1f}")
        rows.append(cells)
    return rows


@pytest.mark.parametrize("result", [recorded, timed_result], ids=["recorded", "made"])
def test_the_kernel_tables_hold_the_numbers_of_the_json(result: Any) -> None:
    found = result()
    data = align_json(found)
    tables = iter(Reading(align_page(found)).of_class("kernels"))
    for phase in data["phases"].values():
        for case in phase["cases"]:
            table = next(tables)
            body, totals = table.rows[2:-2], table.rows[-2:]
            assert [[row[0], *row[6:]] for row in body] == expected_rows(phase, case["case"])
            for row, key in zip(totals, ("gpu_ns", "elapsed_ns"), strict=True):
                assert [us(case["mock"][key]), us(case["e2e"][key])] == [row[3], row[5]]
    assert next(tables, None) is None


def test_sums_samples_and_shares_are_those_of_the_json() -> None:
    data = align_json(recorded())
    page = Reading(recorded_page())
    sums, samples = iter(page.of_class("sums")), iter(page.of_class("samples"))
    shares = iter(page.of_class("shares"))
    for phase in data["phases"].values():
        for case in phase["cases"]:
            rows = [row for row in phase["kernels"] if row["case"] == case["case"]]
            for name, _, mock, e2e, _ in next(sums).rows[1:]:
                for cell, side in ((mock, "mock"), (e2e, "e2e")):
                    own = [r for r in rows if r[side] and (r["e2e"] or r["mock"])["short"] == name]
                    assert cell == us(sum(row[side]["median_ns"] for row in own), 1)
            for cells, side in zip(next(samples).rows[1:], ("mock", "e2e"), strict=True):
                assert cells[2].split() == [us(ns, 1) for ns in case[side]["samples_ns"]]
            assert next(shares).rows[1:] == [
                [s["name"], f"{s['launches']:,}", us(s["gpu_ns"], 1), f"{100 * s['share']:.1f} %"]
                for s in case["outside"]
            ]


def test_cases_and_regions_are_told() -> None:
    phase = align_json(timed_result())["phases"]["context"]
    page = Reading(align_page(timed_result()))
    cases, found = page.of_class("cases")[0], page.of_class("found")[0]
    assert cases.rows[1] == [
        "1 × 4,096", "eager", "20 / 24", "7", "✗ 2 + 1 glue",
        "5,866.2", "7,176.9", "0.82", "6,042.2", "7,392.2", "0.82",
    ]  # fmt: skip
    assert found.rows[1] == [
        "1 × 4,096", "module range of the launch", "6", "20 / 24", "0", "0",
        "99.8 %", "0", "61.2 %",
    ]  # fmt: skip
    assert phase["cases"][0]["explained"] == 0.6124
    assert "lost_kernel" in page.text
    assert "Kernels that no launch explains" in page.text


def test_bars_are_as_long_as_the_json_says() -> None:
    """The longest sum of a case is 100 %; the others are held against it."""
    data = align_json(timed_result())["phases"]["context"]
    rows = [row for row in data["kernels"] if row["case"] == "1 × 4,096"]
    sums: dict[str, list[int]] = {}
    for row in rows:
        own = sums.setdefault((row["e2e"] or row["mock"])["short"], [0, 0])
        for at, side in enumerate(("mock", "e2e")):
            own[at] += row[side]["median_ns"] if row[side] else 0
    longest = max(max(pair) for pair in sums.values())
    page = Reading(align_page(timed_result()))
    names = [row[0] for row in page.of_class("sums")[0].rows[1:]]
    bars = [a["style"] for tag, a in page.tags if tag == "td" and "--m" in a.get("style", "")]
    for name, style in zip(names, bars, strict=False):
        mock, e2e = (float(part.split(":")[1]) for part in style.split(";"))
        assert (mock, e2e) == pytest.approx([100 * ns / longest for ns in sums[name]], rel=0.01)
    assert any(style.startswith("--m:100") or style.endswith("--e:100") for style in bars)


def test_a_failure_shows_its_kernels_cause_and_next_step() -> None:
    page = Reading(align_page(timed_result()))
    rows = page.of_class("kernels")[0].rows[2:-2]
    assert [row[1] for row in rows] == [
        "=", "=", "~ variant", "≈ role", "− e2e only", "+ mock only", "=", "≠ dtype",
    ]  # fmt: skip
    assert rows[3][2] == "cooperative_topk_cs8 mock: topKPerRowPrefill"
    marked = [a.get("class") for tag, a in page.tags if tag == "tr" and a.get("class")]
    assert marked[:8].count("x") == 3
    check = next(row for row in page.of_class("checks")[0].rows if row[1] == "missing / extra")
    assert check[0] == "✗ fail"
    for words in (
        "the engine launches indexer_k_quant",
        "likely cause the mock has no KV cache",
        "next step give the mock the engine's KV cache",
        "kernels indexer_k_quant",
    ):
        assert words in check[2]
    assert "Next: give the mock the engine's KV cache" in page.text


def test_a_grid_that_differs_shows_both() -> None:
    result = timed_result()
    phase = result.phases[1]
    pair = phase.cases[0].pairs[0]
    assert pair.mock is not None
    wide = replace(pair, mock=replace(pair.mock, grid=(264, 2, 1)))
    case = replace(phase.cases[0], pairs=(wide,))
    page = Reading(align_page(replace(result, phases=(replace(phase, cases=(case,)),))))
    assert page.of_class("kernels")[0].rows[2][4:6] == ["264×2 ≠ 132", "256"]


def test_an_alignment_of_nothing_is_told() -> None:
    page = Reading(align_page(nothing_compared()))
    assert page.of_class("kernels") == []
    assert "? inconclusive" in page.text
    assert "nothing to lay side by side" in page.text
    assert "No kernel was compared." in page.text


def test_an_older_result_says_what_it_lacks() -> None:
    page = Reading(align_page(made_result()))
    assert page.text.count("stored by an older opkit, without the start of each kernel") == 3
    assert page.text.count("stored by an older opkit, without the times of single regions") == 3
    assert not [a for tag, a in page.tags if tag == "figure" and a.get("class") == "timeline"]


def test_provenance_is_complete() -> None:
    result = recorded()
    page = Reading(recorded_page())
    known = result.provenance
    for file in known["files"]:
        assert file["sha256"] in page.text
        assert file["name"] in page.text
    for key, value in (
        *known["policy"].items(),
        *known["recipe"].items(),
        *known["versions"].items(),
    ):
        assert str(key) in page.text
        assert isinstance(value, list | tuple) or str(value) in page.text
    for digest in known["layer_source"].values():
        assert digest in page.text
    assert "dsa-20261121-103000-ab12cd" in page.text
    assert " ".join(known["commands"]["mock"])[:60] in page.text
    assert len(page.of_class("operands")[0].rows) == 1 + len(known["operands"])
    more = replace(result, provenance=known | {"rack": "left <3>"})
    assert "rack left <3>" in " ".join(Reading(align_page(more)).text.split())


def test_what_the_provenance_does_not_say_is_a_dash() -> None:
    known = {"files": [{"name": "mock.sqlite"}], "operands": [{"name": "kv"}]}
    page = Reading(align_page(replace(timed_result(), provenance=known)))
    assert "–mock.sqlite––" in "".join(page.text.split())
    assert page.of_class("operands")[0].rows[1] == ["kv", "", "–", "–", "–", "–"]


HOSTILE = "evil<script>alert(1)</script>&amp;\"'$x$`</style>"


def test_names_are_text_wherever_they_stand() -> None:
    result = timed_result()
    phase = result.phases[1]
    case = phase.cases[0]
    kernel = replace(case.pairs[0].mock, name=f"void {HOSTILE}()", short=HOSTILE)  # type: ignore[type-var]
    other = replace(kernel, name=f"void {HOSTILE}(int)")  # type: ignore[type-var]
    case = replace(case, pairs=(replace(case.pairs[0], mock=kernel, e2e=other),))
    check = CheckResult("names", Outcome.FAIL, HOSTILE, (HOSTILE,), HOSTILE, HOSTILE)
    phase = replace(phase, cases=(case,), checks=(check,), notes=(HOSTILE,))
    known = result.provenance | {"gpu": HOSTILE, "commands": {"mock": [HOSTILE], "e2e": []}}
    text = align_page(replace(result, phases=(phase,), provenance=known), name=HOSTILE)
    assert "<script>alert" not in text
    page = Reading(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert page.of_class("kernels")[0].rows[2][2:4] == [HOSTILE, "1/2"]
    assert page.of_class("names")[0].rows[1] == ["1", HOSTILE, f"void {HOSTILE}()"]
    assert page.of_class("sums")[0].rows[1][0] == HOSTILE


@every_page
def test_a_page_asks_for_nothing(kind: str) -> None:
    text = PAGES[kind]()
    page = Reading(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), (name, value)
    assert not re.findall(
        r"url\((?!#)[^)]*\)|@import|https?://[^\s\"'<)]*\.(?:css|js|woff2?)", text
    )
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


@every_page
def test_a_page_can_be_read_aloud(kind: str) -> None:
    page = Reading(PAGES[kind]())
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    names = {tag for tag, _ in page.tags}
    assert {"header", "nav", "main", "footer"} <= names
    for tag, attributes in page.tags:
        if tag in ("svg", "img"):
            assert attributes.get("aria-label") or attributes.get("alt")
        if tag == "th":
            # One without a scope heads its row, as test_names_head_their_rows makes sure.
            assert attributes.get("scope", "row") in ("col", "row", "colgroup")
        if tag == "html":
            assert attributes["lang"] == "en"
    assert page.tables
    assert all(table.caption for table in page.tables)
    skip = next(a for tag, a in page.tags if tag == "a")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert skip["href"] == "#main"
    for _, attributes in page.tags:
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in ids


def test_a_real_page_stays_small_and_is_the_same_twice() -> None:
    text = recorded_page()
    assert 100_000 < len(text.encode()) < GOAL_BYTES
    assert align_page(recorded(), name="dsa-20261121-103000-ab12cd") == text
