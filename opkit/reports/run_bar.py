"""The progress of a run of many cases on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.text import Text

from opkit.collect.workers.tally import Status
from opkit.reports.collecting import duration
from opkit.reports.progress import LiveLog

LINE_EVERY_S = 10.0  # without a terminal
BAR = 28  # cells


class RunBar(LiveLog):
    """How a run stands. Call it with each :class:`Status`; use as a context manager."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock)
        self._last = self._began
        self._status: Status | None = None

    def __call__(self, status: Status) -> None:
        self._status = status
        now = self._clock()
        if status.note:
            self._print(status.note, now)
        if self._live is not None:
            return
        done = status.done + status.skipped + sum(status.failed.values())
        if now - self._last >= LINE_EVERY_S or done == status.planned:
            self._last = now
            self._print(summary(status), now)

    def _live_part(self) -> RenderableType:
        return "" if self._status is None else self._drawn(self._status)

    def _drawn(self, status: Status) -> Group:
        done = status.done + status.skipped + sum(status.failed.values())
        bar = ProgressBar(total=max(1, status.planned), completed=done, width=BAR)
        lanes = [Text(f"  {name}  {what}", style="dim") for name, what in status.lanes.items()]
        return Group(bar, Text(summary(status)), *lanes)


def summary(status: Status) -> str:
    """One line: how many, how fast, how long still, and what failed."""
    parts = [f"{status.done + status.skipped:,} of {status.planned:,}"]
    if status.rate is not None:
        parts.append(f"{status.rate:,.0f} cases/min")
    if status.eta_s is not None:
        parts.append(f"{duration(status.eta_s)} left")
    parts.append(f"GPU measuring {status.busy:.0%}")
    parts += [f"{count} {cause}" for cause, count in status.failed.items()]
    return " · ".join(parts)
