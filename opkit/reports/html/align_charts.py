"""The charts of one case of an alignment."""

from __future__ import annotations

from markupsafe import Markup

from opkit.align.result import CaseMatch
from opkit.reports.facts import us
from opkit.reports.html.charts import E2E, MOCK, Chart

WIDTH = 620
BARS = 12  # names drawn; the table has all
LONGEST = 34  # characters of a name that leave room for its bar
LETTER = 6.7  # pixels that one takes, at most


def bars(name: str, case: CaseMatch) -> Markup:
    """GPU time per kernel, mock and E2E beside each other, longest first.

    Args:
        name: unique in the page.
        case: a case with at least one kernel.
    """
    shown = case.by_kernel[:BARS]
    chart = Chart(
        name,
        WIDTH,
        52 + 26 * len(shown),
        f"GPU time per kernel in µs, mock and E2E: the {len(shown)} longest of "
        f"{len(case.by_kernel)}; the table below has all",
        fixed=True,
    )
    axes = chart.axes
    for at, kernel in enumerate(shown):
        for side, ns, launches, shift, colour in (
            ("mock", kernel.mock_ns, kernel.mock_launches, -0.2, MOCK),
            ("E2E", kernel.e2e_ns, kernel.e2e_launches, 0.2, E2E),
        ):
            plural = "launch" if launches == 1 else "launches"
            [bar] = axes.barh(at + shift, ns / 1000, 0.36, color=colour, clip_on=False)
            chart.mark(bar, f"{kernel.name}\n{side}: {us(ns)} µs in {launches} {plural}")
    names = [_short(kernel.name) for kernel in shown]
    axes.set_yticks(range(len(shown)), names)
    chart.margins(10 + LETTER * max(map(len, names)), 24, 4, 36)
    axes.tick_params(axis="y", labelfontfamily="monospace")
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("µs of one region, sum of medians")
    axes.grid(visible=False, axis="y")
    return chart.svg()


def spread(name: str, case: CaseMatch) -> Markup:
    """GPU time of single regions in the order in which they ran, mock left and E2E right.

    Args:
        name: unique in the page.
        case: a case with samples on some side.
    """
    sides = (("mock", case.mock, MOCK), ("E2E", case.e2e, E2E))
    chart = Chart(
        name,
        WIDTH,
        230,
        "GPU time of single regions in µs, in the order in which they ran",
        columns=2,
        fixed=True,
        sharey=True,
    )
    for axes, (side, summary, colour) in zip(chart.panels, sides, strict=True):
        samples = [ns / 1000 for ns in summary.samples_ns]
        numbers = range(1, len(samples) + 1)
        [line] = axes.plot(numbers, samples, "o", color=colour, markersize=4)
        low, high = (us(f(summary.samples_ns)) if samples else "–" for f in (min, max))
        chart.dots(line, f"{side}: {len(samples)} regions from {low} to {high} µs")
        axes.axhline(summary.gpu_ns / 1000, color=colour, linewidth=1, dashes=(4, 3))
        axes.set_xlabel(f"{side}: region")
        axes.set_xlim(0, len(samples) + 1)
    chart.axes.set_ylabel("µs")
    chart.margins(62, 6, 8, 38, gap=14)
    _widen(chart)
    return chart.svg()


def _widen(chart: Chart) -> None:
    """The y axis spans 4 % at least, so that the noise of a quiet case looks like noise."""
    low, high = chart.axes.get_ylim()
    least = 0.04 * high
    if high - low < least:
        middle = (low + high) / 2
        chart.axes.set_ylim(middle - least / 2, middle + least / 2)


def _short(name: str) -> str:
    """A name with its middle left out: its beginning says what, its end which."""
    if len(name) <= LONGEST:
        return name
    half = (LONGEST - 1) // 2
    return f"{name[: LONGEST - 1 - half]}…{name[-half:]}"
