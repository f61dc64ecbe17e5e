"""Which lane does which task next: the one list that all lanes of a run take from.

Tasks of a group that ran out of memory are tried again in a *lot* of their own, whose lanes begin
with a fresh process: what came before them in the old one may have held the memory.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from opkit.collect.work import Group, Task


@dataclass
class Job:
    """A task, and how often it was tried."""

    task: Task
    attempts: int = 0


@dataclass(eq=False)
class Lot:
    """What is left of a group's tasks. ``fresh``: to be begun in a fresh process."""

    group: Group
    fresh: bool = False
    jobs: deque[Job] = field(default_factory=deque)
    lanes: set[str] = field(default_factory=set)


class Board:
    """Lots and the lanes at work on them. Safe to use from several threads.

    A lane joins a lot and stays until it is empty, since each change costs a build. Lots nobody
    works on come first, in their order, then the one with the most tasks a lane.

    Args:
        groups: the work.
        stopped: whether the run is being stopped; then nothing is given out.
    """

    def __init__(self, groups: Sequence[Group], stopped: Callable[[], bool]) -> None:
        self._lots = [Lot(group, jobs=deque(map(Job, group.tasks))) for group in groups]
        self._stopped = stopped
        self._changed = threading.Condition()
        self._barred: dict[tuple[str, str], str] = {}  # (lane, group): why
        self._hands: dict[str, Lot] = {}  # lots of which a lane holds a task

    def join(self, lane: str) -> Lot | None:
        """A lot for the lane, waiting for one while others may still give tasks back.

        Returns:
            None when there is nothing more for this lane.
        """
        with self._changed:
            while not self._stopped():
                open_to = [lot for lot in self._lots if (lane, lot.group.name) not in self._barred]
                waiting = [lot for lot in open_to if lot.jobs]
                if waiting:
                    free = [lot for lot in waiting if not lot.lanes]
                    chosen = free[0] if free else max(waiting, key=_share)
                    chosen.lanes.add(lane)
                    return chosen
                held = {lot.group.name for lot in self._hands.values()}
                if not any(lot.group.name in held for lot in open_to):
                    return None
                self._changed.wait(0.5)
            return None

    def leave(self, lane: str, lot: Lot, reason: str = "") -> None:
        """The lane is done with the lot; with a ``reason``, for good and with its whole group."""
        with self._changed:
            lot.lanes.discard(lane)
            if reason:
                self._barred[lane, lot.group.name] = reason
            self._changed.notify_all()

    def retire(self, lane: str, reason: str) -> None:
        """The lane can do nothing any more."""
        with self._changed:
            for lot in self._lots:
                lot.lanes.discard(lane)
                self._barred.setdefault((lane, lot.group.name), reason)
            self._changed.notify_all()

    def take(self, lane: str, lot: Lot, *, anywhere: bool = False) -> Job | None:
        """The lot's next task; the lane holds it until :meth:`settle` or :meth:`give_back`.

        Args:
            anywhere: take any: another run walks through the same list.
        """
        with self._changed:
            if self._stopped() or not lot.jobs:
                return None
            self._hands[lane] = lot
            number = random.randrange(len(lot.jobs)) if anywhere else 0
            job = lot.jobs[number]
            del lot.jobs[number]
            return job

    def settle(self, lane: str) -> None:
        """The task that the lane holds needs nothing more."""
        with self._changed:
            self._hands.pop(lane, None)
            self._changed.notify_all()

    def give_back(self, lane: str, lot: Lot, job: Job) -> None:
        """Somebody else may have the task that the lane holds."""
        with self._changed:
            lot.jobs.appendleft(job)
        self.settle(lane)

    def again(self, lane: str, lot: Lot, job: Job) -> None:
        """Try the task that the lane holds again later, in a fresh process."""
        with self._changed:
            for other in self._lots:
                if other.fresh and other.group is lot.group:
                    break
            else:
                other = Lot(lot.group, fresh=True)
                self._lots.append(other)
            other.jobs.append(job)
        self.settle(lane)

    def wake(self) -> None:
        """Let waiting lanes see that the run is being stopped."""
        with self._changed:
            self._changed.notify_all()

    def left(self) -> list[tuple[Group, tuple[Task, ...], str]]:
        """Groups with tasks that nobody did, and the lanes' reasons."""
        found = []
        for lot in self._lots:
            if lot.jobs:
                reasons = {
                    why: None for (_, name), why in self._barred.items() if name == lot.group.name
                }
                tasks = tuple(job.task for job in lot.jobs)
                found.append((lot.group, tasks, "; ".join(reasons)))
        return found


def _share(lot: Lot) -> float:
    """Tasks for each lane, if one more joined."""
    return len(lot.jobs) / (len(lot.lanes) + 1)
