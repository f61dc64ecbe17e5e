"""What a run did not test: a line for each reason, at the end of pytest's output."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell the reasons of all skips, each once (a file that is skipped whole counts as one)."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("not tested here")
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number:4}  {reason}")
