"""How far reading a trace is, on stderr: a bar for what takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from opkit.reports.progress import LiveLog

QUIET_S = 0.8  # most answers are there by then
BAR = 28  # cells


class ParseBar(LiveLog):
    """Call it with what is read and how much of it is done (0 to 1); use as a context manager.

    Args:
        console: where to; by default stderr.
        clock: seconds, monotonic.
        every_s: where there is no terminal, a plain line each so many seconds; 0: none.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = 0.0,
    ) -> None:
        super().__init__(console, clock)
        self._what, self._done = "", 0.0
        self._every = every_s
        self._next_line = self._began + QUIET_S

    def __call__(self, what: str, done: float) -> None:
        self._what, self._done = what, done
        if self._live is None and self._every and (now := self._clock()) >= self._next_line:
            self._print(f"{what} ({done:.0%})", now)
            self._next_line = now + self._every

    def _live_part(self) -> RenderableType:
        elapsed = self._clock() - self._began
        if not self._what or elapsed < QUIET_S:
            return ""
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=1.0, completed=self._done, width=BAR),
            Text(self._what, no_wrap=True, overflow="ellipsis"),
            Text(f"{elapsed:.0f} s", style="dim"),
        )
        return line
