"""The drawings of a collection: curves against the roofline, power, and the clock over the run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from opkit.collect.desk.desk import CurveGroup, Desk, Mark, Panel, TableDesk
from opkit.collect.desk.series import AXES, SEPARATOR, Layout, number, word
from opkit.collect.tables.validate import Value
from opkit.reports.html.charts import BAD, E2E, MOCK, PAGE, QUIET, TEXT, WARN, Chart
from opkit.reports.html.collection_text import (
    kernel_words,
    short_number,
)

# Styles that stand hundreds of times in a page, as classes of collection.html.
CLASSES = {
    "fill:var(--mock);stroke:var(--mock)": "own",
    "fill:var(--page);stroke:var(--mock)": "own hollow",
    "fill:var(--page);stroke:var(--e2e)": "shipped",
    "fill:none;stroke:var(--mock);stroke-opacity:0.4;stroke-width:3.2": "bar",
}
# Of a chart with panels, in pixels: its width is the page's column.
WIDTH = 1240
INNER = 118  # height of a panel
LEFT, RIGHT, TITLE, FOOT = 50, 14, 20, 38  # around all panels
GAP, BETWEEN = 14, 36  # between two of a row, and two rows: a title and numbers
DOT = 21.0  # area of a dot, square points
SHOWN_KERNELS = 3  # that a tip names of those that changed
SOURCES = {"gpu": "GPU", "elapsed": "elapsed"}
BELOW = 25  # by how much the axis reaches below the shortest row, at most, for the roofline
WIDE = 1.05  # most over least sample from which a bar reaches beyond its dot


def curves(name: str, group: CurveGroup, table: TableDesk, title: str) -> Markup:
    """The curves of a group as small multiples on common logarithmic axes.

    Args:
        name: unique in the page.
        group: its panels; at least one has a point.
        table: that it is of.
        title: what the chart shows, for who cannot see it.
    """
    layout = table.layout
    told = f"{title}: latency against {axis(layout.x)}"
    chart, axes = small_multiples(
        name, [panel.name for panel in group.panels], told, (axis(layout.x), "ms")
    )
    for panel, ax in zip(group.panels, axes, strict=True):
        _curve(chart, ax, panel, table)
    scales(axes, [mark.x for panel in group.panels for mark in panel.marks])
    least = min(mark.point.spread.least for panel in group.panels for mark in panel.marks)
    logarithmic(axes, least / BELOW)
    return shortened(chart.svg())


def power(name: str, group: CurveGroup, layout: Layout, title: str) -> Markup:
    """Watts of a group's points, on common axes; panels without power are left out."""
    panels = [panel for panel in group.panels if any(m.point.measured.power for m in panel.marks)]
    told = f"{title}: power against {axis(layout.x)}"
    chart, axes = small_multiples(
        name, [panel.name for panel in panels], told, (axis(layout.x), "W")
    )
    for panel, ax in zip(panels, axes, strict=True):
        marks = [mark for mark in panel.marks if mark.point.measured.power]
        watts = [mark.point.measured.power.watts for mark in marks if mark.point.measured.power]
        [line] = ax.plot(_places(marks), watts, "o-", color=MOCK, markersize=4.5, linewidth=1.2)
        chart.mark(line, [_power_tip(mark, panel, layout) for mark in marks])
        limits = [mark.point.measured.power.limit_watts or math.nan for mark in marks
                  if mark.point.measured.power]  # fmt: skip
        ax.plot(_places(marks), limits, "--", color=QUIET, linewidth=1.1)
        ax.set_ylim(bottom=0)
    scales(axes, [mark.x for panel in panels for mark in panel.marks])
    return shortened(chart.svg())


def clocks(desk: Desk) -> Markup:
    """SM clock and temperature after each row, over the time of the run; throttled rows marked."""
    names = list(dict.fromkeys(moment.gpu for moment in desk.moments))
    label = "SM clock and temperature after each row, over the run"
    chart = Chart("clocks", WIDTH, 230, label, rows=2, sharex=True)
    above, below = chart.panels
    for gpu, colour in zip(names, (MOCK, E2E, TEXT, WARN) * len(names), strict=False):
        found = [moment for moment in desk.moments if moment.gpu == gpu]
        minutes = [moment.seconds / 60 for moment in found]
        mhz = [moment.sm_mhz or math.nan for moment in found]
        heat = [moment.temperature_c or math.nan for moment in found]
        above.plot(minutes, mhz, color=colour, linewidth=1.0)
        below.plot(minutes, heat, color=colour, linewidth=1.0)
        slow = [moment for moment in found if moment.throttled]
        if slow:
            [line] = above.plot(
                [moment.seconds / 60 for moment in slow],
                [moment.sm_mhz or math.nan for moment in slow],
                "v", color=BAD, markersize=7,
            )  # fmt: skip
            labels = {mark.point.key: table.layout.place(mark.point.columns)
                      for table in desk.tables for mark in table.marks}  # fmt: skip
            chart.mark(line, [
                f"{labels.get(moment.key, moment.key)}\nthrottled"
                f"{' (' + ', '.join(moment.reasons) + ')' if moment.reasons else ''}: "
                f"{number(moment.sm_mhz or 0)} MHz, {moment.temperature_c} °C, "
                f"{moment.seconds / 60:.1f} min"
                for moment in slow
            ])  # fmt: skip
    above.set_ylabel("SM MHz")
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    below.set_ylabel("°C")
    below.set_xlabel("minutes since the first row")
    return chart.svg()


def more(mark: Mark) -> str:
    """What is told of a point beside its row of numbers, which ``collection.js`` reads."""
    lines = list(mark.point.odd)
    if mark.new or mark.gone:
        lines.append(f"other kernels than before: {kernel_words(mark, SHOWN_KERNELS)}")
    return "\n".join(lines)


def small_multiples(
    name: str, titles: Sequence[str], label: str, units: tuple[str, str]
) -> tuple[Chart, list[Axes]]:
    """A chart with axes for each panel, in rows of three to five; the rest stay empty.

    Args:
        name, label: of the chart.
        titles: of the panels, at least one.
        units: what stands along x and y.
    """
    count = len(titles)
    # Few rows first, then few empty places.
    rows, _, columns = min((math.ceil(count / n), -count % n, n) for n in (3, 4, 5))
    columns = min(columns, count)
    width = WIDTH if columns > 2 else WIDTH * columns // 3
    inner = INNER if rows > 1 else INNER + 60
    height = TITLE + rows * inner + (rows - 1) * BETWEEN + FOOT
    chart = Chart(name, width, height, label, rows=rows, columns=columns, fixed=True,
                  sharex=True, sharey=True)  # fmt: skip
    across = (width - LEFT - RIGHT - (columns - 1) * GAP) / columns
    for place, ax in enumerate(chart.panels):
        row, column = divmod(place, columns)
        low = height - TITLE - inner - row * (inner + BETWEEN)
        left = LEFT + column * (across + GAP)
        ax.set_position((left / width, low / height, across / width, inner / height))
    chart.figure.supxlabel(units[0], fontsize=11, color=QUIET, y=3 / height, va="bottom")
    chart.figure.supylabel(units[1], fontsize=11, color=QUIET, x=2 / width, ha="left")
    for place in range(count, len(chart.panels)):
        chart.panels[place].set_visible(False)
        # The one above shows the numbers that this one would have had.
        chart.panels[place - columns].tick_params(labelbottom=True)
    for title, ax in zip(titles, chart.panels, strict=False):
        ax.set_title(title, y=1.0, pad=3, loc="left", fontsize=11)
    return chart, chart.panels[:count]


def _curve(chart: Chart, ax: Axes, panel: Panel, table: TableDesk) -> None:
    marks, at = panel.marks, _places(panel.marks)
    ms = [mark.point.latency_ms for mark in marks]
    bounds = [mark.point.bound_ms or math.nan for mark in marks]
    line = "--" if len(marks) > 1 else "_"  # a line through one point is none
    if not all(map(math.isnan, bounds)):
        ax.plot(at, bounds, line, color=QUIET, linewidth=1.1, markersize=16)
    shipped = [mark.shipped_ms or math.nan for mark in marks]
    if not all(map(math.isnan, shipped)):
        look: dict[str, Any] = {"markersize": 3.6, "markerfacecolor": PAGE, "linewidth": 0.8}
        ax.plot(at, shipped, "D:", color=E2E, clip_on=False, **look)
    wide = [(x, mark.point.spread) for x, mark in zip(at, marks, strict=True)
            if mark.point.spread.most > WIDE * mark.point.spread.least]  # fmt: skip
    if wide:
        ax.vlines(
            [x for x, _ in wide], [found.least for _, found in wide], [f.most for _, f in wide],
            color=MOCK, linewidth=3.2, alpha=0.4, clip_on=False,
        )  # fmt: skip
    ax.plot(at, ms, "-", color=MOCK, linewidth=1.2, clip_on=False)
    odd = [(x, y) for x, y, mark in zip(at, ms, marks, strict=True) if mark.outlier]
    if odd:
        ax.plot(*zip(*odd, strict=True), "X", color=BAD, markersize=10.5, clip_on=False)
    # One artist for all dots, so that the arrow keys go along the curve.
    edges = [BAD if mark.outlier else MOCK for mark in marks]
    faces = [BAD if mark.outlier else PAGE if table.flagged(mark.point) else MOCK for mark in marks]
    dots = ax.scatter(at, ms, s=DOT, c=faces, edgecolors=edges, linewidths=1, clip_on=False,
                      zorder=3)  # fmt: skip
    chart.mark(dots, [more(mark) for mark in marks])
    changes = [
        math.sqrt(left * right) if left > 0 else (left + right) / 2
        for left, right, mark in zip(at, at[1:], marks[1:], strict=False)
        if mark.new or mark.gone
    ]
    if changes:
        ax.vlines(changes, 0, 0.07, color=TEXT, linewidth=1.2, transform=ax.get_xaxis_transform())


def shortened(svg: Markup) -> Markup:
    """The chart with its most frequent styles as classes."""

    def tag(found: re.Match[str]) -> str:
        text = found[0]
        for style, name in CLASSES.items():
            if f' style="{style}"' in text:
                text = text.replace(f' style="{style}"', "")
                if ' class="' in text:
                    return text.replace(' class="', f' class="{name} ')
                return text.replace(" ", f' class="{name}" ', 1)
        return text

    return Markup(re.sub(r"<(?:use|path) [^>]*>", tag, svg))  # the chart's own text, still escaped


def _places(marks: Sequence[Mark]) -> list[float]:
    """Where marks stand along x: their value, or their number where it is text."""
    return [float(mark.x) if not isinstance(mark.x, str) else float(place)
            for place, mark in enumerate(marks)]  # fmt: skip


def logarithmic(axes: Sequence[Axes], floor: float) -> None:
    """Logarithmic in y, from ``floor`` on."""
    for ax in axes:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        low = max(low, floor)
        ax.set_ylim(low, high)
        subs = (1.0,) if high / low > 100 else (1.0, 2.0, 5.0)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(NullLocator())


def scales(axes: Sequence[Axes], values: Sequence[Value]) -> None:
    """Logarithmic in x where values spread, with powers of two as ticks; else the values."""
    known = sorted({float(value) for value in values if not isinstance(value, str)})
    spread = len(known) > 1 and known[-1] >= 4 * max(known[0], 1.0)
    for ax in axes:
        if not known:  # text has places, and its names are in the tips and the table
            ax.set_xticks([])
            continue
        if spread and known[0] > 0:
            ax.set_xscale("log", base=2)
        elif spread:  # 0, nothing cached, stands one octave left of 1
            ax.set_xscale("symlog", base=2, linthresh=1, linscale=1)
        ax.xaxis.set_major_locator(FixedLocator(_ticks(known) if spread else known[:6]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda at, _: short_number(round(at))))
        ax.xaxis.set_minor_locator(NullLocator())


def _ticks(values: Sequence[float]) -> list[float]:
    """At most six powers of two that span the values, evenly in octaves."""
    low = math.floor(math.log2(max(values[0], 1.0)))
    high = math.ceil(math.log2(values[-1]))
    step = max(1, math.ceil((high - low) / 4))
    return [2.0**power for power in range(low, high + 1, step)]


def axis(x: str) -> str:
    """What stands along x, in words."""
    return AXES.get(x, x)


def _place(mark: Mark, panel: Panel, layout: Layout) -> str:
    return SEPARATOR.join(
        part for part in (panel.name, f"{word(layout.x)} {number(mark.x)}".strip()) if part
    )


def _power_tip(mark: Mark, panel: Panel, layout: Layout) -> str:
    found = mark.point.measured.power
    assert found is not None
    limit = f" of {found.limit_watts:,.0f} W" if found.limit_watts else ""
    return (
        f"{_place(mark, panel, layout)}: {found.watts:,.1f} W{limit}\n"
        f"{found.joules_per_iteration:.4g} J a forward\n{found.method}, {found.seconds:.1f} s"
    )
