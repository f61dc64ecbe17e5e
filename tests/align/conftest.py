"""Prints how the mutated recordings were judged."""

from __future__ import annotations

import pytest
from mutate import COUNTS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not COUNTS:
        return
    terminalreporter.section("mutations judged")
    for what in sorted({what for what, _ in COUNTS}):
        found = [f"{verdict} {n}" for (name, verdict), n in sorted(COUNTS.items()) if name == what]
        terminalreporter.line(f"{what:<28} {', '.join(found)}")
    terminalreporter.line(f"{sum(COUNTS.values())} in all")
