"""Progress on stderr: on a terminal a live line with elapsed time, else plain stamped lines."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

# A message that begins so is about a state, not about something done: the next replaces it.
TRANSIENT = "waiting"
REFRESH_HZ = 4.0


class LiveLog:
    """What a run says on stderr: on a terminal lines above a live part, else plain stamped lines.

    Whoever reads it may leave, as in ``2>&1 | head``: the run matters more than the talk.

    Args:
        console: where to; by default stderr.
        clock: seconds, monotonic.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._began = clock()
        self._live: Live | None = None
        self._deaf = False

    def __enter__(self) -> Self:
        # Colour can be forced into a file; a part that rewrites itself belongs on a terminal only.
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(
                console=self._console,
                get_renderable=self._live_part,
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
            self._last_words()
            self._live = None

    def _live_part(self) -> RenderableType:
        """What stands below the lines now."""
        return ""

    def _last_words(self) -> None:
        """Keep what the live part held, if it is to last."""

    def aside(self, message: str) -> None:
        """A line of the log that may be overlooked: dim on a terminal."""
        self._print(message, self._clock(), "dim")

    def _print(self, message: str, moment: float, style: str = "") -> None:
        """One line of the log, stamped with the seconds at ``moment``."""
        if self._deaf:
            return
        stamp = f"{moment - self._began:6.1f} s"
        if self._live is not None:
            text = Text.assemble((stamp, "dim"), "  ", (message, style))
            self._console.print(text, soft_wrap=True)
            return
        try:
            print(f"{stamp}  {message}", file=self._console.file, flush=True)
        except BrokenPipeError:
            self._deaf = True


class Progress(LiveLog):
    """What is happening, said as it happens. Call it with a message; use as a context manager.

    On a terminal the newest message stands beside a spinner and its own elapsed seconds; the one
    before it becomes a line of the log, unless it was only about waiting.
    """

    def __init__(
        self, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(console, clock)
        self._message = ""
        self._since = self._began
        self._spinner = Spinner("dots", style="cyan")

    def __call__(self, message: str) -> None:
        if self._live is None:
            self._print(message, self._clock())
            return
        self._keep()
        if not (message.startswith(TRANSIENT) and self._message.startswith(TRANSIENT)):
            self._since = self._clock()
        self._message = message

    def _keep(self) -> None:
        """Make the live message a line of the log."""
        if self._message and not self._message.startswith(TRANSIENT):
            self._print(self._message, self._since)
            self._message = ""

    def _last_words(self) -> None:
        self._keep()

    def _live_part(self) -> Text:
        """The live line."""
        now = self._clock()
        turning = self._spinner.render(now)
        assert isinstance(turning, Text)
        line = Text.assemble(turning, " ", self._message or "starting")
        line.append(f"  {now - self._since:.0f} s", style="dim")
        line.truncate(max(1, self._console.width - 1), overflow="ellipsis")
        return line
