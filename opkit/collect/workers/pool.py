"""A run: lanes, each in a thread, take tasks from one board until there are none.

What is tried again, what is quarantined, and when a lane gives a group up is decided here, for
lanes on this host and in a cluster alike:

* a task whose worker died, hung or lost its CUDA context is tried once more, first thing in a fresh
  process (what ran before it may have broken the old one); then it is quarantined;
* one that ran out of memory is tried once more at the end, in processes started for such tasks;
* one that the mock refuses, or that raises anything else, is not tried again;
* after two deaths in a row a task that has succeeded is measured once more, and not kept: if it
  succeeds, the cases were to blame and the lane goes on; with the third death in a row the lane
  gives the group up, as it does when a build has failed twice. Other lanes may take what is left;
  what none takes is *not run*, which is not *failed*: the next run takes it.

Callbacks run in the caller's thread, one at a time.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opkit.collect.work import Fault, Group, Row, Task
from opkit.collect.workers.board import Board, Job, Lot
from opkit.collect.workers.lane import BuildFailed, Lane, Stop, Tried, Unwanted
from opkit.collect.workers.parts import Part, PartFailed, Parts, read_parts
from opkit.collect.workers.tally import NotRun, Outcome, Status, Tally
from opkit.errors import BadInput
from opkit.layers.manifest import Manifest

_TRIES = 2  # of a build, and of a task
_POLL_S = 0.2
OnEvent = Callable[[Status], None]
OnBuilt = Callable[[Manifest, Group], None]


@dataclass(frozen=True)
class RunOptions:
    """How a run behaves.

    Attributes:
        deaths: of a lane's workers in a row until it gives the group up.
        retry_failed: try tasks again that an earlier run has quarantined.
        reread_s: seconds between looks at what other runs on the same folder have done.
    """

    deaths: int = 3
    retry_failed: bool = False
    reread_s: float = 2.0


def run_groups(
    groups: Sequence[Group],
    lanes: Sequence[Lane],
    folder: Path,
    options: RunOptions | None = None,
    on_event: OnEvent | None = None,
    on_built: OnBuilt | None = None,
) -> Outcome:
    """Measure what the folder does not have yet.

    Args:
        groups: the work; their names differ.
        lanes: who does it; they are ended when this returns or raises.
        folder: the run's output folder.
        options: see :class:`RunOptions`.
        on_event: told how things stand, after each change.
        on_built: told what each build says of itself, before anything is measured with it; what it
            raises ends the run and is raised here.

    Raises:
        BadInput: two groups of one name, no lanes, or parts in the folder that cannot be read.
        KeyboardInterrupt: the caller was interrupted; everything started has been ended.
    """
    if len({group.name for group in groups}) < len(groups):
        raise BadInput("two groups of work have the same name")
    if not lanes:
        raise BadInput("there is nothing to run on")
    run = _Run(groups, lanes, folder, options or RunOptions(), on_event, on_built)
    return run.run()


@dataclass
class _Shift:
    """One lane's way through the run.

    Attributes:
        deaths: of its workers since the last success.
        last: what the last one died of.
        proven: a task that has succeeded in the lot at hand.
    """

    lane: Lane
    deaths: int = 0
    last: str = ""
    proven: Task | None = None


@dataclass
class _Seen:
    """What is on the disk, looked at by several threads.

    Attributes:
        every_s: seconds between two looks.
        old: keys that earlier runs have quarantined, if they are to be tried again.
        read: rows read since the start.
    """

    parts: Parts
    every_s: float
    old: frozenset[str]
    read: int = 0
    looked: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def row(self, key: str, *, now: bool = False) -> Row | None:
        """The row, of any run, that spares this one the work on ``key``."""
        with self.lock:
            if now or time.monotonic() - self.looked >= self.every_s:
                self.read += self.parts.refresh(strict=False)
                self.looked = time.monotonic()
            row = self.parts.row(key)
            return None if row is not None and not row.ok and key in self.old else row


class _Run:
    """See :func:`run_groups`."""

    def __init__(
        self,
        groups: Sequence[Group],
        lanes: Sequence[Lane],
        folder: Path,
        options: RunOptions,
        on_event: OnEvent | None,
        on_built: OnBuilt | None,
    ) -> None:
        self._options = options
        self._lanes = lanes
        self._on_event = on_event
        self._on_built = on_built
        parts = read_parts(folder)
        old = frozenset(parts.failed()) if options.retry_failed else frozenset()
        self._seen = _Seen(parts, options.reread_s, old)
        self._part = Part(folder)
        self._kept = 0  # rows of this run on the disk
        self._lock = threading.Lock()
        left = [replace(group, tasks=self._left(group)) for group in groups]
        self._stop = threading.Event()
        self._stopped = ""
        self._error: BaseException | None = None
        self._board = Board([group for group in left if group.tasks], self._stop.is_set)
        self._tally = Tally(sum(len(group.tasks) for group in left), len(lanes))
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def _left(self, group: Group) -> tuple[Task, ...]:
        return tuple(task for task in group.tasks if self._seen.row(task.key) is None)

    # In the caller's thread.

    def run(self) -> Outcome:
        """See :func:`run_groups`."""
        # Daemons: should this thread be torn away, they must not go on measuring on their own.
        threads = [
            threading.Thread(target=self._serve, args=(_Shift(lane),), name=lane.name, daemon=True)
            for lane in self._lanes
        ]
        interrupted: KeyboardInterrupt | None = None
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                self._answer_calls(_POLL_S)
            self._answer_calls(0.0)
        except KeyboardInterrupt as error:
            interrupted = error
        except BaseException as error:
            self._error = error
        finally:
            interrupted = self._join(threads) or interrupted
            self._part.close()
        if interrupted is not None:
            raise interrupted
        if self._error is not None:
            raise self._error
        not_run = tuple(
            NotRun(group, tasks, self._stopped or why) for group, tasks, why in self._board.left()
        )
        return self._tally.outcome(not_run, self._stopped)

    def _answer_calls(self, wait_s: float) -> None:
        """Do what the lanes' threads want done in this one."""
        try:
            call = self._calls.get(block=wait_s > 0, timeout=wait_s)
            while True:
                call()
                call = self._calls.get_nowait()
        except queue.Empty:
            return

    def _join(self, threads: Sequence[threading.Thread]) -> KeyboardInterrupt | None:
        """Wait for the lanes, which end their workers, however impatient the user is."""
        impatient: KeyboardInterrupt | None = None
        while True:
            try:
                if any(thread.is_alive() for thread in threads):
                    self._halt()
                for thread in threads:
                    if thread.ident is not None:
                        thread.join()
                return impatient
            except KeyboardInterrupt as error:
                impatient = error

    def _event(self, note: str = "") -> None:
        if self._on_event is not None:
            self._on_event(self._tally.status(note))

    # In the lanes' threads.

    def _halt(self) -> None:
        self._stop.set()
        self._board.wake()

    def _later(self, change: Callable[[], None], note: str = "") -> None:
        """Change the tally, in the caller's thread, and tell how things stand then."""

        def call() -> None:
            change()
            self._event(note)

        self._calls.put(call)

    def _note(self, note: str) -> None:
        self._calls.put(functools.partial(self._event, note))

    def _doing(self, lane: Lane, what: str) -> None:
        self._later(functools.partial(self._tally.doing, lane.name, what))

    def _spend(self, seconds: Mapping[str, float]) -> None:
        self._calls.put(functools.partial(self._tally.spend, seconds))

    def _ask(self, call: Callable[..., None], *arguments: Any) -> None:
        """Have ``call`` done in the caller's thread and wait for it; if it raises, the run ends."""
        answered = threading.Event()

        def ask() -> None:
            call(*arguments)
            answered.set()

        self._calls.put(ask)
        while not answered.wait(_POLL_S):
            if self._stop.is_set():
                raise Unwanted

    def _serve(self, shift: _Shift) -> None:
        """A lane's thread: from lot to lot until there is none for it."""
        lane, board = shift.lane, self._board
        try:
            while (lot := board.join(lane.name)) is not None:
                shift.proven = None
                if lot.fresh:
                    lane.drop()
                reason = self._work(shift, lot)
                board.leave(lane.name, lot, reason)
                if reason:
                    lane.drop()
                    shift.deaths = 0
                    self._note(f"{lane.name} gives up {lot.group.name}: {reason}")
        except (Stop, PartFailed) as stop:
            self._stopped = str(stop)
            self._halt()
        except BaseException as error:
            self._error = self._error or error
            self._halt()
        finally:
            lane.drop()
            self._doing(lane, "ended")

    def _work(self, shift: _Shift, lot: Lot) -> str:
        """Do the lot's tasks; return why the lane gives its group up, if it does."""
        lane, board = shift.lane, self._board
        while lot.jobs:
            try:
                # A build that outlives the last task would only hold the run up.
                if reason := self._build(shift, lot, lambda: self._stop.is_set() or not lot.jobs):
                    return reason
                job = board.take(lane.name, lot, anywhere=self._others())
                if job is None:
                    return ""
                reason = self._in_hand(shift, lot, job)
                if reason := reason or self._sick(shift, lot):
                    return reason
            except Unwanted:
                return ""
        return ""

    def _in_hand(self, shift: _Shift, lot: Lot, job: Job) -> str:
        """:meth:`_job`; whatever it raises, the task is not lost with it."""
        try:
            return self._job(shift, lot, job)
        except BaseException:
            self._board.give_back(shift.lane.name, lot, job)
            raise

    def _build(self, shift: _Shift, lot: Lot, cancelled: Callable[[], bool]) -> str:
        """Have the lot's mock; return why not."""
        lane, group = shift.lane, lot.group
        if lane.serves(group):
            return ""
        failures: list[str] = []
        while len(failures) < _TRIES:
            self._doing(lane, f"builds {group.name}")
            began = time.monotonic()
            try:
                report = lane.build(group, cancelled)
            except BuildFailed as failure:
                self._spend({"lost": time.monotonic() - began})
                self._note(f"{lane.name}: no mock of {group.name}: {failure.reason}")
                failures.append(failure.reason)
                if failure.start and (failure.final or len(failures) == _TRIES):
                    self._board.retire(lane.name, failure.reason)
                if failure.final:
                    break
                continue
            self._spend({"start": report.start_s, "build": report.build_s})
            if self._on_built is not None:
                self._ask(self._on_built, report.manifest, group)
            return ""
        return failures[-1]

    def _job(self, shift: _Shift, lot: Lot, job: Job) -> str:
        """See one task through; return why the lane gives the group up, if it does."""
        lane, task = shift.lane, job.task
        if self._seen.row(task.key) is not None:
            self._later(self._tally.skip)
            return self._settle(lane)
        while True:
            if reason := self._build(shift, lot, self._stop.is_set):
                self._board.give_back(lane.name, lot, job)
                return reason
            tried = self._try(shift, task, job.attempts + 1, keep=True)
            job.attempts += tried.began
            last = job.attempts >= _TRIES
            row = tried.row
            if row.fault is Fault.MEMORY and not last:
                self._board.again(lane.name, lot, job)
                return ""
            # It may have written its row before it died.
            before = self._seen.row(task.key, now=True) if tried.died else None
            if row.ok or before is not None or last or not tried.died:
                self._keep(lane, row if before is None else before, kept=before is not None)
                return self._settle(lane)
            if tried.gone or shift.deaths >= self._options.deaths:
                self._board.give_back(lane.name, lot, job)
                return ""

    def _try(self, shift: _Shift, task: Task, attempt: int, *, keep: bool) -> Tried:
        """Measure once, and count deaths."""
        lane, case = shift.lane, task.planned.case
        again = ", again" if attempt > 1 else ""
        self._doing(lane, f"{case.label()}{again}")
        tried = lane.measure(task, attempt, keep, self._stop.is_set)
        self._spend(tried.seconds)
        if tried.row.ok:
            shift.deaths, shift.proven = 0, task
        else:
            shift.deaths += tried.died
            shift.last = tried.row.error
            self._note(f"{lane.name}: {case.label()}: {tried.row.fault}: {tried.row.error}")
        return tried

    def _sick(self, shift: _Shift, lot: Lot) -> str:
        """Why the lane cannot go on after deaths; a task that has succeeded is the test."""
        if shift.deaths == self._options.deaths - 1 and shift.proven is not None:
            if reason := self._build(shift, lot, self._stop.is_set):
                return reason
            self._try(shift, shift.proven, 1, keep=False)
        if shift.deaths < self._options.deaths:
            return ""
        return f"its worker died {shift.deaths} times in a row, the last time: {shift.last}"

    def _keep(self, lane: Lane, row: Row, *, kept: bool) -> None:
        """Have the row on the disk, and count it."""
        if not kept and not (row.ok and lane.keeps):
            with self._lock:
                self._part.append(row)
        with self._lock:
            self._kept += 1
        self._later(functools.partial(self._tally.row, row))

    def _others(self) -> bool:
        """Whether another run adds to the folder: side by side they would do the same twice."""
        # A row may be on the disk before its lane has counted it.
        return self._seen.read > self._kept + len(self._lanes)

    def _settle(self, lane: Lane) -> str:
        self._board.settle(lane.name)
        return ""
