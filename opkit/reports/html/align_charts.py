"""The chart of one case of an alignment: how its regions spread."""

from __future__ import annotations

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from opkit.align.result import CaseMatch
from opkit.reports.facts import us
from opkit.reports.html.charts import E2E, MOCK, Chart

WIDTH = 620


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
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    chart.axes.set_ylabel("µs")
    chart.axes.yaxis.set_major_locator(MaxNLocator(4))
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
