"""What tests of collection share: lanes with fakes, and a look at the processes that are left."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fake_mocks

from opkit.collect.work import Group
from opkit.collect.workers.lane import LaneOptions, LocalLane
from opkit.collect.workers.parts import Parts, read_parts
from opkit.collect.workers.pool import RunOptions, run_groups
from opkit.collect.workers.tally import Outcome

HERE = Path(__file__).parent


class Field:
    """A run's output folder, and what the fakes have written of themselves."""

    def __init__(self, root: Path) -> None:
        self.out = root / "out"
        self.fakes = root / "fakes"
        self.logs = root / "logs"
        self.fakes.mkdir(exist_ok=True)

    @property
    def env(self) -> dict[str, str]:
        return {fake_mocks.FOLDER: str(self.fakes), "PYTHONPATH": str(HERE)}

    def options(self, **changes: Any) -> LaneOptions:
        quick = {"start_s": 20.0, "build_s": 20.0, "case_s": 20.0, "grace_s": 1.0}
        fakes = {"env": self.env, "tools": fake_mocks.TOOLS}
        return LaneOptions(**{**fakes, **quick, **changes})

    def lanes(self, count: int = 1, **changes: Any) -> list[LocalLane]:
        options = self.options(**changes)
        return [
            LocalLane(f"gpu{number}", str(number), options, self.logs, self.out)
            for number in range(count)
        ]

    def run(
        self,
        groups: Sequence[Group],
        count: int = 1,
        options: RunOptions | None = None,
        on_event: Callable[..., None] | None = None,
        on_built: Callable[..., None] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Run to the end, and see that no process is left."""
        try:
            return run_groups(
                groups, self.lanes(count, **changes), self.out, options, on_event, on_built
            )
        finally:
            self.ended()

    def noted(self, kind: str) -> list[str]:
        """What the fakes wrote of one kind, line by line."""
        path = self.fakes / kind
        return path.read_text().splitlines() if path.is_file() else []

    def begun(self, number: int) -> int:
        """How often the case of this m was begun."""
        return sum(line.split()[1] == str(number) for line in self.noted("begun"))

    def parts(self) -> Parts:
        return read_parts(self.out)

    def lines(self) -> list[str]:
        """All lines of all parts."""
        found = (self.out / "parts").glob("*")
        return [line for path in found for line in path.read_text().splitlines()]

    def ended(self) -> None:
        """See that no process is left; those that were sent SIGKILL may take a moment."""
        until(lambda: self.survivors() == [], 5.0)

    def survivors(self) -> list[int]:
        """Living processes of the workers' sessions."""
        sessions = {int(line) for line in self.noted("pids")}
        return [pid for pid, session, _ in living() if session in sessions]


def living() -> Iterator[tuple[int, int, int]]:
    """(process, session, parent) of all that live; zombies have ended."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text()
        except OSError:  # ended since it was listed
            continue
        state, parent, _, session = text[text.rindex(")") + 2 :].split()[:4]
        if state not in "ZX":
            yield int(folder.name), int(session), int(parent)


def until(condition: Callable[[], Any], limit_s: float = 20.0) -> Any:
    """Wait for ``condition`` and return what it gave."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)
    return found


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """An environment variable, for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
