"""What a run has done so far, and at its end: counts, rates, and where the time went."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opkit.collect.work import Group, Row, Task

# What lanes' time is counted as. ``lost``: attempts that failed. ``rest``: waiting, and ending.
ACTIVITIES = ("start", "build", "prepare", "measure", "lost", "rest")
_WINDOW = 50  # rows that the rate is taken over: builds and large cases come in stretches


@dataclass(frozen=True)
class Status:
    """A run at one moment, as plain data.

    Attributes:
        planned: tasks of this run.
        done: those with a value by now.
        skipped: those that another run on the same folder has done.
        failed: those quarantined, by cause.
        rate: tasks a minute, lately; None before there are two.
        eta_s: seconds left at that rate.
        busy: share of all lanes' time in which a GPU ran measured iterations, 0 to 1.
        lanes: what each lane does.
        note: what has just happened, if it is worth a line.
    """

    planned: int
    done: int
    skipped: int
    failed: Mapping[str, int]
    rate: float | None
    eta_s: float | None
    busy: float
    lanes: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True)
class NotRun:
    """Tasks of a group that were not measured and did not fail: the next run takes them."""

    group: Group
    tasks: tuple[Task, ...]
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        planned, done, skipped: see :class:`Status`.
        failed: rows of the tasks that were quarantined.
        not_run: what is left, and why.
        stopped: why the run was stopped as a whole (a full disk); empty when it was not.
        wall_s: seconds from start to end.
        lanes: lanes that worked.
        activities: seconds of all lanes together, by ``ACTIVITIES``; they add up to
            ``wall_s × lanes``.
        busy_s: seconds in which a GPU ran measured iterations, of all lanes together.
    """

    planned: int
    done: int
    skipped: int
    failed: tuple[Row, ...]
    not_run: tuple[NotRun, ...]
    stopped: str
    wall_s: float
    lanes: int
    activities: Mapping[str, float]
    busy_s: float

    @property
    def complete(self) -> bool:
        """Whether every task has a value or an entry in quarantine."""
        return not self.not_run and not self.stopped

    @property
    def failed_by_cause(self) -> dict[str, int]:
        """How many failed, by fault."""
        return dict(Counter(str(row.fault) for row in self.failed))

    @property
    def largest_cost(self) -> str:
        """The activity, other than measuring, that took most of the lanes' time."""
        costs = {name: spent for name, spent in self.activities.items() if name != "measure"}
        return max(costs, key=lambda name: costs[name])


class Tally:
    """Counts as things happen. Used by one thread."""

    def __init__(self, planned: int, lanes: int, clock: Callable[[], float] = time.monotonic):
        self.planned = planned
        self.done = 0
        self.skipped = 0
        self.failed: list[Row] = []
        self.busy_s = 0.0
        self._lanes = lanes
        self._clock = clock
        self._began = clock()
        self._spent: Counter[str] = Counter()
        self._moments: deque[float] = deque(maxlen=_WINDOW)
        self._doing: dict[str, str] = {}

    def doing(self, lane: str, what: str) -> None:
        """A lane begins with something."""
        self._doing[lane] = what

    def spend(self, seconds: Mapping[str, float]) -> None:
        """A lane has spent time on activities."""
        self._spent.update(seconds)

    def row(self, row: Row) -> None:
        """A task has its row."""
        self._moments.append(self._clock())
        if row.measurement is not None:
            self.done += 1
            self.busy_s += sum(row.measurement.elapsed_ms) / 1000
        else:
            self.failed.append(row)

    def skip(self) -> None:
        """A task was done elsewhere."""
        self.skipped += 1

    def status(self, note: str = "") -> Status:
        """How things stand."""
        now = self._clock()
        count = len(self._moments)
        span = now - self._moments[0] if count else 0.0
        rate = (count - 1) / span * 60 if count > 1 and span > 0 else None
        left = self.planned - self.done - self.skipped - len(self.failed)
        wall = max(now - self._began, 1e-9) * max(self._lanes, 1)
        return Status(
            planned=self.planned,
            done=self.done,
            skipped=self.skipped,
            failed=dict(Counter(str(row.fault) for row in self.failed)),
            rate=rate,
            eta_s=left / rate * 60 if rate else None,
            busy=min(1.0, self.busy_s / wall),
            lanes=dict(self._doing),
            note=note,
        )

    def outcome(self, not_run: tuple[NotRun, ...], stopped: str) -> Outcome:
        """The end."""
        wall = self._clock() - self._began
        known = {name: self._spent[name] for name in ACTIVITIES if name != "rest"}
        rest = max(0.0, wall * self._lanes - sum(known.values()))
        return Outcome(
            planned=self.planned,
            done=self.done,
            skipped=self.skipped,
            failed=tuple(self.failed),
            not_run=not_run,
            stopped=stopped,
            wall_s=wall,
            lanes=self._lanes,
            activities={**known, "rest": rest},
            busy_s=self.busy_s,
        )
