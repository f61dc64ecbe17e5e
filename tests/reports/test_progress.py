"""Progress: stamped lines in a log, a line that rewrites itself on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from opkit.reports.progress import Progress


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_every_message_is_a_stamped_line() -> None:
    clock, log = Clock(), io.StringIO()
    with Progress(Console(file=log, width=20), clock) as progress:
        progress("start the server under nsys")
        clock.now += 5.25
        progress("waiting for [http://x] 5 s (503 Service Unavailable)")
    assert log.getvalue().splitlines() == [
        "   0.0 s  start the server under nsys",
        "   5.2 s  waiting for [http://x] 5 s (503 Service Unavailable)",
    ]


def test_forced_colour_makes_no_terminal() -> None:
    log = io.StringIO()
    with Progress(Console(file=log, force_terminal=True), Clock()) as progress:
        progress("one")
    assert log.getvalue() == "   0.0 s  one\n"


def kept_lines(text: str) -> list[str]:
    """What stays on the screen: the lines that no control sequence has erased."""
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in text.split("\n")]
    return [line for line in lines if re.match(r" *\d+\.\d s  ", line)]


def test_on_a_terminal_waiting_is_rewritten_and_the_rest_is_kept() -> None:
    clock, screen = Clock(), Terminal()
    console = Console(file=screen, force_terminal=True, width=60, color_system=None)
    with Progress(console, clock) as progress:
        progress("start the server under nsys")
        clock.now += 1
        for waited in range(3):
            progress(f"waiting for http://x {waited} s")
            clock.now += 5
        progress("the server was ready after 16 s")
    assert [line.strip().split("  ", 1)[1] for line in kept_lines(screen.getvalue())] == [
        "start the server under nsys",
        "the server was ready after 16 s",
    ]


def test_the_live_line_counts_its_own_seconds_and_fits() -> None:
    clock, screen = Clock(), Terminal()
    console = Console(file=screen, force_terminal=True, width=30, color_system=None)
    progress = Progress(console, clock)
    with progress:
        clock.now += 40
        progress("judging")
        clock.now += 7
        assert progress._live_part().plain.endswith(" judging  7 s")
        progress("waiting for a very long address of a server")
        assert progress._live_part().cell_len == 29


class Gone(io.StringIO):
    def write(self, _: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_has_gone_does_not_end_the_run() -> None:
    with Progress(Console(file=Gone()), Clock()) as progress:
        progress("one")
        progress("two")
        assert progress._deaf


def test_an_error_passes_and_the_last_message_is_kept() -> None:
    screen = Terminal()
    console = Console(file=screen, force_terminal=True, width=60, color_system=None)

    def interrupted() -> None:
        with Progress(console, Clock()) as progress:
            progress("wave 1x8+2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [line.strip() for line in kept_lines(screen.getvalue())] == ["0.0 s  wave 1x8+2"]
