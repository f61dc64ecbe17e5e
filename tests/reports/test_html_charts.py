"""Charts as SVG of a page: colours are the page's, text stays text, marks can be named."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from opkit.reports.html.charts import E2E, MOCK, Chart, _straight


def chart(name: str = "c") -> Chart:
    return Chart(name, 400, 200, 'Time <of> "A" & B')


def parsed(made: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(made.svg())


def test_a_bar_is_one_named_mark_in_the_pages_colour() -> None:
    made = chart()
    for bar, tip in zip(
        made.axes.bar([1, 2], [3, 4], color=MOCK), ("a: 3 µs", "b <x>"), strict=True
    ):
        made.mark(bar, tip)
    root = parsed(made)
    marks = [found for found in root.iter() if "mark" in found.get("class", "").split()]
    assert [mark.get("aria-label") for mark in marks] == ["a: 3 µs", "b <x>"]
    assert [mark.tag for mark in marks] == ["path", "path"]
    assert marks[0].get("class") == "mock mark"
    assert (root.get("role"), root.get("data-roving")) == ("group", "")  # for page.js
    assert root.get("aria-label") == 'Time <of> "A" & B'


def test_a_line_names_each_of_its_points() -> None:
    made = chart()
    [line] = made.axes.plot([1, 2, 3], [1, 4, 9], "o-", color=E2E)
    made.mark(line, ["one", "two", "three"])
    root = parsed(made)
    points = [found for found in root.iter("use") if found.get("aria-label")]
    assert [point.get("aria-label") for point in points] == ["one", "two", "three"]
    assert all("var(--e2e)" in point.get("style", "") for point in points)
    ids = {found.get("id") for found in root.iter()} - {None}
    assert {point.get("href", "")[1:] for point in points} <= ids


@pytest.mark.parametrize("tips", [["one"], ["1", "2", "3", "4"]])
def test_points_without_a_name_or_names_without_a_point_are_refused(tips: list[str]) -> None:
    made = chart()
    [line] = made.axes.plot([1, 2, 3], [1, 4, 9], "o-")
    made.mark(line, tips)
    with pytest.raises(ValueError, match=f"c: {len(tips)} texts for 3 points"):
        made.svg()


def test_what_was_not_drawn_cannot_be_named() -> None:
    made = chart()
    [line] = made.axes.plot([1, 2, 3], [1, 4, 9])
    made.mark(line, "gone")
    line.remove()
    with pytest.raises(ValueError, match="'gone' was not drawn"):
        made.svg()


def test_dots_are_one_path() -> None:
    made = chart()
    [line] = made.axes.plot(range(200), range(200), "o", color=MOCK)
    made.dots(line, "200 regions")
    root = parsed(made)
    [dots] = [found for found in root.iter("path") if "dots" in found.get("class", "").split()]
    assert dots.get("d", "").count("M") == 200
    assert dots.get("style") == "stroke:var(--mock)"
    assert dots.get("aria-label") == "200 regions"


def test_text_stays_text_and_a_dollar_a_dollar() -> None:
    made = chart()
    made.axes.set_xlabel("kernel$a$b <T>")
    assert "kernel$a$b <T>" in [found.text for found in parsed(made).iter("text")]


def test_two_charts_of_a_page_share_no_id() -> None:
    def ids(name: str) -> set[str]:
        made = chart(name)
        made.axes.plot([1, 2], [1, 2], "o-")
        return {found.get("id", "") for found in parsed(made).iter()} - {""}

    assert ids("a")
    assert not ids("a") & ids("b")


def test_a_chart_without_marks_is_a_picture_with_a_name() -> None:
    made = chart()
    made.axes.plot([1, 2], [1, 2])
    root = parsed(made)
    assert (root.get("role"), root.get("aria-label")) == ("img", 'Time <of> "A" & B')
    assert "style>" not in made.svg()  # a style element would reach the whole page
    assert "#" not in made.svg().replace("url(#", "").replace('href="#', "")  # no colour of its own


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("M1 2L3 2L3 4L1 4z", "M1 2H3V4H1z"),
        ("M1.5 2L3 4L3 -4.5", "M1.5 2L3 4V-4.5"),
        ("M1 2L1 2", "M1 2H1"),
        ("M0 0L5 0M2 2L2 9", "M0 0H5M2 2V9"),
        ("M0 0C1 1 2 2 3 3z", "M0 0C1 1 2 2 3 3z"),
        ("M-1.2 7L3.4 7", "M-1.2 7H3.4"),
    ],
)
def test_straight_lines_name_one_number(path: str, short: str) -> None:
    assert _straight(path) == short


def test_equal_charts_are_equal_text() -> None:
    assert chart().svg() == chart().svg()
