"""What a process died of, by its exit code and its log: the deepest cause, or what it said last.

vLLM's front only says that its engine's process failed, "see root cause above" (0.24.0,
``v1/engine/utils.py``, ``v1/engine/exceptions.py``, ``v1/executor/multiproc_executor.py``). The
cause is a traceback of that process, or of one of its workers, under a prefix of its own
(``utils/system_utils.py``, ``decorate_logs``).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_READ = 1 << 20  # bytes of the log's end that are looked at; a traceback takes about 10,000
_SHOWN = 300  # characters of a cause, or of a line, that are shown
_LAST = 5  # lines that are shown of what was said last
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_PROCESS = re.compile(r"\((\w[^()]*? pid=\d+)\) ?")
_LOGGED = re.compile(r"[A-Z]+ \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_FRAME = re.compile(r'\s+File "(.+)", line (\d+), in ')
# What vLLM logs before the traceback that ended a process.
_FATAL = re.compile(r"(failed to start|encountered a fatal error|hit an exception)\.$")
_ELSEWHERE = re.compile(r"[Ss]ee (root cause|stack trace)|stack trace above|^\w+: Executor failed")
_DIRECT = "The above exception was the direct cause"
_HANDLING = "During handling of the above exception"
_NAMED = re.compile(r"\b\w*(Error|Exception)\b: |^\s*what\(\): ")
# What faulthandler writes when the process is hit, before the frames, innermost first.
_DUMP = re.compile(r"^(Fatal Python error: .*|.*\(most recent call first\):)$")


@dataclass
class _Raised:
    """An exception in a log: its text, where it was raised, whether it ended its process."""

    line: int
    text: str
    where: str
    fatal: bool


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


def points_elsewhere(error: str) -> bool:
    """Whether an error only says that the cause is in the log."""
    return bool(_ELSEWHERE.search(error))


def root_cause(log: Path, start: int = 0) -> str:
    """The deepest cause in an engine's log, as ``ValueError: why (in file.py:12)``.

    The first exception that ended a process of the engine: those after it follow from it. Without
    one, the last exception in the log. Of exceptions that were raised from one another, the first;
    of those raised while another was handled, the last.

    Args:
        log: the file.
        start: bytes to leave out: another engine's.

    Returns:
        Empty when the log holds no exception that tells.
    """
    try:
        text = _text(log, start)
    except OSError:
        return ""
    raised = [each for lines in _by_process(text) for each in _raised(lines)]
    raised.sort(key=lambda each: each.line)
    told = [each for each in raised if not points_elsewhere(each.text)]
    fatal = [each for each in told if each.fatal]
    if not told:
        return ""
    cause = fatal[0] if fatal else told[-1]
    return cause.text[:_SHOWN] + (f" (in {cause.where})" if cause.where else "")


def last_words(log: Path, start: int = 0) -> str:
    """What a dead process wrote last: where it stood when it was hit, else its last lines.

    Before the last lines stands the last one that names an error, if it is none of them: a long
    list of C++ frames may follow it.

    Args:
        log, start: as for :func:`root_cause`.

    Returns:
        Up to six lines without prefixes, between bars; that the log cannot be read, if so.
    """
    try:
        text = _text(log, start)
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    found = sorted(line for of_process in _by_process(text) for line in of_process)
    lines = [line.strip()[:_SHOWN] for _, line in found if line.strip()]
    hits = [at for at, line in enumerate(lines) if _DUMP.match(line)]
    if hits:
        return " | ".join(lines[hits[0] : hits[0] + _LAST])
    named = [line for line in lines[:-_LAST] if _NAMED.search(line)]
    last = lines[-_LAST:]
    before = [] if any(_NAMED.search(line) for line in last) else named[-1:]
    return " | ".join(before + last)


def _text(log: Path, start: int) -> str:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - _READ))
        return _COLOUR.sub("", file.read().decode(errors="replace"))


def _by_process(text: str) -> Iterable[list[tuple[int, str]]]:
    """Lines with their numbers, of each process apart: several write at the same time."""
    found: dict[str, list[tuple[int, str]]] = {}
    for number, line in enumerate(text.splitlines()):
        process = _PROCESS.match(line)
        rest = line[process.end() :] if process else line
        logged = _LOGGED.match(rest)
        of_process = found.setdefault(process[1] if process else "", [])
        of_process.append((number, rest[logged.end() :] if logged else rest))
    return found.values()


def _raised(lines: list[tuple[int, str]]) -> Iterator[_Raised]:
    """The exceptions of one process, one a chain."""
    chain: _Raised | None = None
    before, link, at = "", "", 0
    while at < len(lines):
        number, text = lines[at]
        at += 1
        if text.startswith((_DIRECT, _HANDLING)):
            link = text
        elif text.startswith("Traceback (most recent call last)"):
            body = at
            while at < len(lines) and (not lines[at][1].strip() or lines[at][1][0].isspace()):
                at += 1
            if at == len(lines):  # cut off
                break
            found = _exception(number, [each for _, each in lines[body:at]], lines[at:])
            found.fatal = bool(_FATAL.search(before))
            at += 1
            if chain is not None and link:
                found.fatal = found.fatal or chain.fatal
                keep = link.startswith(_DIRECT) or points_elsewhere(found.text)
                chain = chain if keep else found
            else:
                if chain is not None:
                    yield chain
                chain = found
            link = ""
        elif text.strip():
            before = text
    if chain is not None:
        yield chain


def _exception(number: int, frames: list[str], after: list[tuple[int, str]]) -> _Raised:
    text = after[0][1].strip()
    if (text.endswith(":") or "validation error" in text) and len(after) > 1:
        text += f" {after[1][1].strip()}"  # the first line says nothing without the next
    return _Raised(number, text, _where(frames), False)


def _where(frames: list[str]) -> str:
    """The innermost frame that is not the standard library's, as ``triton/runtime/build.py:48``."""
    found = [match for frame in frames if (match := _FRAME.match(frame))]
    own = [m for m in found if "-packages/" in m[1] or not re.search(r"/lib/python3", m[1])]
    if not own:
        return ""
    parts = own[-1][1].rpartition("-packages/")[2].strip("/").split("/")
    return f"{'/'.join(parts[-3:])}:{own[-1][2]}"
