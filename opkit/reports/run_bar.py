"""The progress of a run of many cases on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from opkit.collect.workers.tally import Status
from opkit.reports.collecting import duration

LINE_EVERY_S = 10.0  # without a terminal
REFRESH_HZ = 4.0
BAR = 28  # cells


class RunBar:
    """How a run stands. Call it with each :class:`Status`; use as a context manager."""

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._began = clock()
        self._last = self._began
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(
                console=self._console,
                refresh_per_second=REFRESH_HZ,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, status: Status) -> None:
        if status.note:
            self._say(status.note)
        if self._live is not None:
            self._live.update(self._drawn(status))
            return
        now = self._clock()
        done = status.done + status.skipped + sum(status.failed.values())
        if now - self._last >= LINE_EVERY_S or done == status.planned:
            self._last = now
            self._say(summary(status))

    def _say(self, text: str) -> None:
        stamp = f"{self._clock() - self._began:6.1f} s  "
        self._console.print(Text(stamp + text), soft_wrap=True)

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
