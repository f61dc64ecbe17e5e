"""The progress of a collection: plain lines without a terminal, and a reader who may leave."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from opkit.collect.workers.tally import Status
from opkit.reports.run_bar import RunBar, summary

HALF = Status(
    planned=200, done=90, skipped=10, failed={"timed out": 2}, rate=612.0, eta_s=59.0, busy=0.31,
    lanes={"gpu0": "1 × 16"},
)  # fmt: skip


class Gone(io.StringIO):
    """A stderr whose reader has left, as in `2>&1 | head -1`."""

    def write(self, _text: str, /) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def ticking(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def test_the_summary_tells_rate_time_and_causes() -> None:
    assert summary(HALF) == (
        "100 of 200 · 612 cases/min · 59 s left · GPU measuring 31% · 2 timed out"
    )


def test_without_a_terminal_lines_come_now_and_then() -> None:
    file = io.StringIO()
    with RunBar(Console(file=file), clock=ticking(4.0).__next__) as bar:
        for _ in range(6):
            bar(HALF)
    lines = file.getvalue().splitlines()
    assert 1 < len(lines) < 6
    assert all("100 of 200" in line for line in lines)


def test_a_reader_who_has_gone_does_not_end_an_hour_of_gpu_work() -> None:
    with RunBar(Console(file=Gone()), clock=ticking(60.0).__next__) as bar:
        try:
            for _ in range(3):
                bar(HALF)
        except (BrokenPipeError, SystemExit) as error:
            pytest.fail(f"the run would have ended: {error!r}")
