"""What a process died of, and what it said last."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_TAIL_BYTES = 64 * 1024
_TAIL_LINES = 5
# What faulthandler writes when the process is hit, before the frames, innermost first.
_DUMP = re.compile(r"^(Fatal Python error: .*|.*\(most recent call first\):)$")


def how_it_ended(code: int | None) -> str:
    """The end of a process, from its code as :mod:`subprocess` gives it; None: it lives."""
    if code is None:
        return "does not end"
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def last_words(log: Path) -> str:
    """What a dead worker wrote last: where it stood when it was hit, else the last lines."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    hits = [number for number, line in enumerate(lines) if _DUMP.match(line)]
    first = hits[0] if hits else max(0, len(lines) - _TAIL_LINES)
    return " | ".join(lines[first : first + _TAIL_LINES])
