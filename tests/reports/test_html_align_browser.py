"""The page of an alignment in a real headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page
from made_timed import timed_result
from test_html_align import PAGES, TRACES, expected_rows, recorded, recorded_page

from opkit.align.judge import Question, judge
from opkit.align.result import AlignResult
from opkit.align.result_json import align_json
from opkit.layers.registry import find_op
from opkit.reports.facts import ALIKE
from opkit.reports.html.align import align_page

# Text and its ground as the browser computes them, for every element that holds text of its own.
CONTRASTS = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (e) => { for (; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor); if (colour[3]) return colour; } };
  const low = [];
  let seen = 0;
  for (const e of document.body.querySelectorAll("*")) {
    if (e.closest("script, noscript, .block.x") || !e.checkVisibility()) continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e);
    const ink = light(rgb(e.closest("svg") ? style.fill : style.color)), page = light(ground(e));
    const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
    seen += 1;
    const css = e.className?.baseVal ?? e.className;
    if (ratio < 4.5) low.push(`${e.tagName}.${css}: ${ratio.toFixed(2)}`);
  }
  return {seen, low: [...new Set(low)]};
})()"""
TABLES = """[...document.querySelectorAll("table.kernels")].map((table) =>
  [...table.tBodies[0].rows].map((row) => [...row.cells].map((c) => c.textContent.trim())))"""
BLOCKS = """[...document.querySelectorAll(".timeline")].map((figure) =>
  [...figure.querySelectorAll(".track")].map((track) => [...track.children].map((b) => ({
    left: parseFloat(b.style.left), width: parseFloat(b.style.width), row: Number(b.dataset.row),
    css: b.className, tip: b.getAttribute("aria-label"),
    pattern: getComputedStyle(b).backgroundImage}))))"""
OPEN_ALL = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
FOCUSED = "document.activeElement.getAttribute('aria-label').split('\\n')[0]"
TIP = "(t => t.hidden ? null : t.textContent)(document.getElementById('tip'))"


@cache
def failing() -> AlignResult:
    return judge(
        Question(
            find_op("dsa"),
            TRACES / "wrong" / "norm_fp32.sqlite.gz",
            (TRACES / "wrong-e2e.sqlite.gz",),
        )
    )


def write(folder: Path, text: str) -> Path:
    file = folder / "page.html"
    file.write_text(text, "utf-8")
    return file


@pytest.fixture(scope="module")
def wrong(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, Any]]:
    """The page of a real mock with other norms, all cases open, and its JSON."""
    result = failing()
    page = browser.open(write(tmp_path_factory.mktemp("wrong"), align_page(result)))
    page.run(OPEN_ALL)
    page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
    yield page, align_json(result)
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("kind", [*PAGES, "wrong"])
def test_a_page_loads_in_silence_and_can_be_read(
    kind: str, dark: bool, browser: Browser, tmp_path: Path
) -> None:
    text = align_page(failing()) if kind == "wrong" else PAGES[kind]()
    file = write(tmp_path, text)
    page = browser.open(file, dark=dark)
    page.run(OPEN_ALL)
    found = page.run(CONTRASTS)
    assert found["seen"] > 20
    assert found["low"] == []
    assert page.requests() == [file.as_uri()]
    assert page.errors() == []
    page.close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("<script>nowhere()</script>", "nowhere is not defined"),
        ("<script>console.error('broken ' + 1)</script>", "broken 1"),
        ("<script>Promise.reject(new Error('late'))</script>", "late"),
        ("<img src='http://127.0.0.1:9/x.png' alt='x'>", "Content Security Policy"),
        ("<link rel=stylesheet href='http://127.0.0.1:9/x.css'>", "Content Security Policy"),
    ],
)
def test_an_error_on_a_page_is_found(
    code: str, said: str, browser: Browser, tmp_path: Path
) -> None:
    text = align_page(timed_result()).replace("</main>", f"{code}</main>")
    page = browser.open(write(tmp_path, text))
    assert any(said in error for error in page.errors()), page.errors()
    page.close()


def test_the_numbers_on_the_page_are_those_of_the_json(
    browser: Browser, wrong: tuple[Page, Any], tmp_path: Path
) -> None:
    real = browser.open(write(tmp_path, recorded_page()))
    for page, data in ((real, align_json(recorded())), wrong):
        tables = page.run(TABLES)
        wanted = [
            expected_rows(phase, case["case"])
            for phase in data["phases"].values()
            for case in phase["cases"]
        ]
        assert [[[row[0], *row[6:]] for row in table] for table in tables] == wanted
        assert len(wanted) >= 4
    real.close()


def test_blocks_stand_where_the_json_says(wrong: tuple[Page, Any]) -> None:
    page, data = wrong
    timelines = page.run(BLOCKS)
    cases = [(phase, case) for phase in data["phases"].values() for case in phase["cases"]]
    assert len(timelines) == len(cases)
    for tracks, (phase, case) in zip(timelines, cases, strict=True):
        rows = [row for row in phase["kernels"] if row["case"] == case["case"]]
        kernels = [row[side] for row in rows for side in ("mock", "e2e") if row[side]]
        end = max(kernel["offset_ns"] + kernel["median_ns"] for kernel in kernels)
        for blocks, side in zip(tracks, ("mock", "e2e"), strict=True):
            own = [(at, row) for at, row in enumerate(rows) if row[side]]
            assert [block["row"] for block in blocks] == [at for at, _ in own]
            for block, (_, row) in zip(blocks, own, strict=True):
                kernel = row[side]
                assert block["left"] == pytest.approx(100 * kernel["offset_ns"] / end, abs=0.01)
                assert block["width"] == pytest.approx(100 * kernel["median_ns"] / end, abs=0.01)
                assert kernel["name"] in block["tip"] or kernel["name"] == kernel["short"]
                assert f"takes {kernel['median_ns'] / 1000:,.2f} ±" in block["tip"]
                assert kernel["short"] in block["tip"].split("\n")[0]
                unlike = row["level"] not in ALIKE
                assert ("x" in block["css"].split()) == unlike
                assert ("gradient" in block["pattern"]) == unlike


def test_what_differs_carries_a_sign(wrong: tuple[Page, Any]) -> None:
    page, data = wrong
    signs = page.run("[...document.querySelectorAll('.signs b')].map((b) => b.textContent)")
    rows = [row for phase in data["phases"].values() for row in phase["kernels"]]
    assert signs.count("+") == sum(row["level"] == "mock only" for row in rows) > 0
    assert signs.count("−") == sum(row["level"] == "e2e only" for row in rows) > 0


def test_keys_go_from_launch_to_launch_and_to_the_other_side(
    browser: Browser, tmp_path: Path
) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    page.run("document.querySelector('.timeline .track .block').focus()")
    assert page.run(FOCUSED) == "mock #1: nvjet_sm90_tst_256x128_64x4"
    page.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert page.run(FOCUSED) == "mock #4: topKPerRowPrefill"
    page.run("new Promise((done) => setTimeout(done, 100))")  # it may have scrolled into view
    assert "≈ role, ratio 0.15" in page.run(TIP)
    page.press("ArrowDown")
    assert page.run(FOCUSED) == "E2E #4: cooperative_topk_cs8"
    assert page.run("document.querySelectorAll('.block.on').length") == 2  # the pair
    assert page.run("document.querySelectorAll('.kernels tr.on').length") == 1
    page.press("ArrowRight")
    assert "− e2e only" in page.run(TIP)
    page.press("ArrowUp")  # nobody there
    assert page.run(FOCUSED) == "E2E #5: indexer_k_quant_and_cache"
    page.press("End")
    assert page.run(FOCUSED) == "E2E #8: gemm_fp8"
    page.press("Home")
    assert page.run(FOCUSED) == "E2E #1: nvjet_sm90_tst_256x128_64x4"
    page.press("Escape")
    assert page.run(TIP) is None
    assert (
        page.run(
            "document.querySelectorAll('.track')[1].querySelectorAll('[tabindex=\"0\"]').length"
        )
        == 1
    )
    page.close()


def test_tab_reaches_the_content_and_each_chart_once(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    page.press("Tab")
    assert page.run("document.activeElement.textContent") == "Skip to content"
    assert page.run("document.activeElement.getBoundingClientRect().left") >= 0
    page.press("Enter")
    assert page.run("document.activeElement.id") == "main"
    stops = page.run("""[...document.querySelectorAll('details[open] [data-roving]')].map(
        (group) => group.querySelectorAll('[tabindex="0"]').length)""")
    assert len(stops) >= 4
    assert set(stops) == {1}
    page.close()


def test_the_pointer_shows_the_same_as_the_focus(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    page.point_at(".timeline .track .block:nth-child(6)")
    tip = page.run(TIP)
    assert tip == page.run("document.querySelectorAll('.timeline .track .block')[5].ariaLabel")
    assert tip.startswith("mock #7: sparse_attn_fwd_kernel") or "+ mock only" in tip
    x, y = page.run("""(dots => { dots.scrollIntoView({block: 'center', behavior: 'instant'});
        const dot = dots.getPointAtLength(0).matrixTransform(dots.getScreenCTM());
        return [dot.x, dot.y]; })(document.querySelector('.chart .dots'))""")
    page.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert "regions from" in page.run(TIP)
    page.close()


def test_everything_that_takes_the_focus_has_a_name(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    page.run(OPEN_ALL)
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    focusable = [
        node
        for node in nodes
        if not node.get("ignored")
        and any(
            p["name"] == "focusable" and p["value"].get("value") for p in node.get("properties", ())
        )
    ]
    assert len(focusable) > 40
    unnamed = [n["role"]["value"] for n in focusable if not n.get("name", {}).get("value")]
    assert [role for role in unnamed if role not in ("RootWebArea", "main")] == []
    page.close()


def test_names_head_their_rows(browser: Browser, tmp_path: Path) -> None:
    """A `th` without a scope heads its row where neither row nor column says otherwise (HTML
    Standard, 4.9.12.2 "Forming relationships between data cells and header cells")."""
    page = browser.open(write(tmp_path, align_page(timed_result())))
    page.run(OPEN_ALL)
    wanted = page.run("document.querySelectorAll('tbody th').length")
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    roles = [n["role"]["value"] for n in nodes if not n.get("ignored")]
    feet = page.run("document.querySelectorAll('tfoot th').length")
    assert roles.count("rowheader") == wanted + feet > 40
    assert roles.count("columnheader") == page.run("document.querySelectorAll('thead th').length")
    page.close()


def test_bars_are_drawn_from_their_cells(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())), script=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    sizes = page.run(
        "getComputedStyle(document.querySelector('.sums td:last-child')).backgroundSize"
    )
    first, second = (float(part.split("%")[0]) for part in sizes.split(", "))
    assert max(first, second) == pytest.approx(100.0)
    assert min(first, second) > 50
    page.close()


def test_without_scripts_all_numbers_are_there(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())), script=False)
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert page.run("document.querySelectorAll('.block').length") == 0
    rows = page.run(TABLES)[0]
    phase = align_json(timed_result())["phases"]["context"]
    assert [[row[0], *row[6:]] for row in rows] == expected_rows(phase, "1 × 4,096")
    assert page.run("document.getElementById('theme').hidden") is True
    page.close()


def test_the_button_changes_the_theme(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    ground = "getComputedStyle(document.body).backgroundColor"
    press = "(b => { b.click(); return b.textContent; })(document.getElementById('theme'))"
    seen = [(page.run(press), page.run(ground)) for _ in range(3)]
    assert seen == [
        ("theme: light", "rgb(255, 255, 255)"),
        ("theme: dark", "rgb(20, 23, 27)"),
        ("theme: auto", "rgb(255, 255, 255)"),
    ]
    page.close()


def test_paper_shows_every_case_in_light(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())), dark=True)
    page.run("dispatchEvent(new Event('beforeprint'))")
    page.emulate(dark=True, media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    drawn = page.run("[...document.querySelectorAll('.timeline')].map((f) => "
                     "f.querySelector('.block').getBoundingClientRect().height > 5)")  # fmt: skip
    assert drawn == [True, True, True]
    assert page.run("getComputedStyle(document.querySelector('.contents')).display") == "none"
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.run("document.querySelectorAll('details[open]').length") < 4
    page.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")
    assert page.errors() == []
    page.close()


def test_a_link_to_a_case_opens_it(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    closed = "document.getElementById('context-2').open"
    assert page.run(closed) is False
    page.run("document.querySelector('a[href=\"#context-2\"]').click()")
    page.run("new Promise((done) => setTimeout(done, 100))")
    assert page.run(closed) is True
    assert page.run("document.querySelectorAll('#context-2 .block').length") > 0
    assert json.loads(page.run("JSON.stringify(location.hash)")) == "#context-2"
    page.close()


def test_a_narrow_window_scrolls_tables_and_not_the_page(browser: Browser, tmp_path: Path) -> None:
    for text in (align_page(failing()), PAGES["nothing"](), recorded_page()):
        page = browser.open(write(tmp_path, text), width=420)
        page.run(OPEN_ALL)
        assert page.run("document.documentElement.scrollWidth") <= 420
        page.close()


def test_zoom_stretches_the_timeline_alone(browser: Browser, tmp_path: Path) -> None:
    page = browser.open(write(tmp_path, align_page(timed_result())))
    width = "document.querySelector('.timeline .canvas').getBoundingClientRect().width"
    whole = "document.documentElement.scrollWidth"
    before, page_width = page.run(width), page.run(whole)
    page.run("document.querySelectorAll('.timeline .tools button')[1].click()")
    assert page.run(width) == pytest.approx(4 * before, rel=0.02)
    assert page.run(whole) == page_width <= 1280
    page.close()


@pytest.mark.parametrize("kind", ["recorded", "made", "wrong"])
def test_a_kernels_share_is_seen_without_scrolling(
    kind: str, browser: Browser, tmp_path: Path
) -> None:
    text = align_page(failing()) if kind == "wrong" else PAGES[kind]()
    page = browser.open(write(tmp_path, text), width=1185)  # 1,200 less a scroll bar
    page.run(OPEN_ALL)
    over = page.run("""[...document.querySelectorAll("table.kernels")].map((table) =>
        table.scrollWidth - table.closest(".scroll").clientWidth)""")
    assert len(over) >= 1
    assert max(over) <= 0
    page.close()
