"""Two collections of one op as one HTML file: ``compare_rows_page``."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup
from matplotlib.axes import Axes

from opkit.collect.comparison import (
    Change,
    CollectionComparison,
    Curve,
    CurveGroup,
    GroupChange,
    Place,
    RowChange,
)
from opkit.collect.desk.series import SEPARATOR, number, word
from opkit.reports.compare_rows import SIGN, end_text, mover_text, row_name
from opkit.reports.html.charts import BAD, E2E, GOOD, MOCK, PAGE, Chart
from opkit.reports.html.collection_charts import (
    axis,
    logarithmic,
    scales,
    shortened,
    small_multiples,
)
from opkit.reports.html.collection_text import milliseconds, share, short_number
from opkit.reports.html.page import render

LOST, WON = "−", "+"
DOT = 15.0  # area of a dot, square points
MARKERS = {Change.SLOWER: ("^", BAD), Change.FASTER: ("v", GOOD)}
ABOVE = 0.5  # the axis begins at this part of the shortest row


@dataclass(frozen=True)
class GroupView:
    """A group of curves, ready to be written."""

    id: str
    section: str
    title: str
    head: str
    group: CurveGroup
    chart: Markup
    grid: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    rows: tuple[RowChange, ...]


def compare_rows_page(found: CollectionComparison) -> str:
    """The page of a comparison of two collections: HTML text that opens offline."""
    tables = [
        (table, [_view(f"t{at}", f"t{at}g{place}", group) for place, group in enumerate(groups)])
        for at, (table, groups) in enumerate(groupby(found.curves, key=lambda g: g.table))
    ]
    sections = [("summary", "Summary"), *((views[0].section, table) for table, views in tables)]
    alone = len(found.only_a) + len(found.only_b)
    sections += [("coverage", f"Coverage ({alone:,})")] if alone else []
    return render(
        "compare_rows.html",
        title=f"{found.op}: {found.names[0]} → {found.names[1]}",
        sections=[*sections, ("provenance", "Provenance")],
        found=found,
        tables=tables,
        ends=list(zip("AB", found.names, found.backends, strict=True)),
        summary=end_text(found),
        facts=[(item.name, item.a, item.b, item.warns) for item in found.differences],
        sign=SIGN,
        separator=SEPARATOR,
        group_name=_group_name,
        row_name=row_name,
        also=_also,
        ms=milliseconds,
        share=share,
        short=short_number,
    )


def _view(section: str, name: str, group: CurveGroup) -> GroupView:
    title = SEPARATOR.join(part for part in (group.table, group.name) if part)
    xs = group.xs
    return GroupView(
        name,
        section,
        group.name or f"latency against {word(group.x) or group.x}",
        word(group.x) or group.x,
        group,
        _chart(name, group, title),
        tuple(
            (curve.name, tuple(_cell({place.x: place for place in curve.places}.get(x))
                               for x in xs))
            for curve in group.curves
        ),
        tuple(place.row for curve in group.curves for place in curve.places if place.row),
    )  # fmt: skip


def _cell(place: Place | None) -> tuple[str, str]:
    """Class and text of a cell of the grid."""
    if place is None:
        return "none", ""
    if place.row is None:
        return ("lost", LOST) if place.only_a else ("won", WON)
    change = place.row.change
    sign = "" if change is Change.SAME else SIGN[change]
    return str(change), f"{sign}{place.row.ratio:.2f}"


def _group_name(group: GroupChange) -> str:
    return SEPARATOR.join(part for part in (group.table, group.group) if part) or "all"


def _also(row: RowChange) -> str:
    """What else is known of a row's change."""
    parts = [mover_text(row)]
    parts += [f"{LOST} {name}" for name in row.kernels_gone]
    parts += [f"{WON} {name}" for name in row.kernels_new]
    parts += ["other variants of its kernels"] if row.variants else []
    for a, b in (row.launch, row.source, (", ".join(row.flags[0]), ", ".join(row.flags[1]))):
        parts += [f"{a or 'no flag'} → {b or 'no flag'}"] if a != b else []
    return "; ".join(part for part in parts if part)


def _chart(name: str, group: CurveGroup, title: str) -> Markup:
    """A's and B's curves over each other, on common logarithmic axes."""
    along = axis(group.x)
    label = f"{title}: latency of A and B against {along}"
    titles = [curve.name for curve in group.curves]
    chart, axes = small_multiples(name, titles, label, (along, "ms"))
    for curve, ax in zip(group.curves, axes, strict=True):
        _curve(chart, ax, curve, group.x)
    places = [place for curve in group.curves for place in curve.places]
    scales(axes, [place.x for place in places])
    known = [ms for p in places for ms in (p.latency_ms_a, p.latency_ms_b) if ms is not None]
    logarithmic(axes, ABOVE * min(known))
    return shortened(chart.svg())


def _curve(chart: Chart, ax: Axes, curve: Curve, x: str) -> None:
    at = [float(place.x) if not isinstance(place.x, str) else float(number_)
          for number_, place in enumerate(curve.places)]  # fmt: skip
    for side, colour, width, alpha in (("a", MOCK, 3.4, 0.5), ("b", E2E, 1.2, 1.0)):
        told = [(here, ms) for here, place in zip(at, curve.places, strict=True)
                if (ms := getattr(place, f"latency_ms_{side}")) is not None]  # fmt: skip
        if told:
            ax.plot(*zip(*told, strict=True), "-", color=colour, linewidth=width, alpha=alpha,
                    clip_on=False)  # fmt: skip
    heights = [_height(place) for place in curve.places]
    for change, (marker, colour) in MARKERS.items():
        moved = [(here, ms) for here, ms, place in zip(at, heights, curve.places, strict=True)
                 if place.row and place.row.change is change]  # fmt: skip
        if moved:
            ax.plot(*zip(*moved, strict=True), marker, color=colour, markersize=9, clip_on=False)
    # One artist for all dots, so that the arrow keys go along the curve.
    edges = [MOCK if place.only_a else E2E for place in curve.places]
    faces = [E2E if place.row else PAGE for place in curve.places]
    dots = ax.scatter(at, heights, s=DOT, c=faces, edgecolors=edges, linewidths=1, clip_on=False,
                      zorder=3)  # fmt: skip
    chart.mark(dots, [_tip(curve, place, x) for place in curve.places])


def _height(place: Place) -> float:
    """B's latency, or A's where only A has the row."""
    ms = place.latency_ms_a if place.latency_ms_b is None else place.latency_ms_b
    assert ms is not None
    return ms


def _tip(curve: Curve, place: Place, x: str) -> str:
    where = SEPARATOR.join(filter(None, (curve.name, f"{word(x)} {number(place.x)}".strip())))
    row = place.row
    if row is None:
        alone = place.only_a or place.only_b
        assert alone is not None
        side = "A" if place.only_a else "B"
        return f"{where}: {milliseconds(alone.latency_ms)} ms, only in {side}\n{alone.why}"
    return (
        f"{where}: {milliseconds(row.latency_ms_a)} → {milliseconds(row.latency_ms_b)} ms\n"
        f"B/A {SIGN[row.change]} {row.ratio:.3f}, same within {share(row.allowed)}"
    )
