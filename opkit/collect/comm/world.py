"""The parent's side of one world: hears its ranks, and says what became of each case.

One rank that dies, reports a fault or falls silent ends the world, since the others would wait for
it for ever; it costs the case in hand. Whatever happens, no rank outlives :func:`run_world`.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from opkit.collect.comm.channel import GARBLED, Channel
from opkit.collect.comm.plan import World
from opkit.collect.comm.processes import (
    Launcher,
    Ranks,
    listening,
)
from opkit.collect.measurement import Timing
from opkit.collect.work import Fault
from opkit.post_mortem import how_it_ended, last_words

POLL_S = 0.2
# A rank's fault may be another's death seen from its side: whose death shows within this time.
BLAME_S = 1.0


@dataclass(frozen=True)
class Broken:
    """Why a world ended early.

    Attributes:
        case: number of the case in hand; None: it did not start.
        fault, error: what happened, for the row.
    """

    case: int | None
    fault: Fault
    error: str


@dataclass(frozen=True)
class Heard:
    """What a caller wants to hear, as it happens.

    Attributes:
        started: a case's number, when rank 0 begins it.
        answered: a case's number and rank 0's answer, or the text of a wrong result.
    """

    started: Callable[[int], None]
    answered: Callable[[int, dict[str, Any] | str], None]


def run_world(
    world: World, timing: Timing, seed: int, launcher: Launcher, heard: Heard
) -> Broken | None:
    """Measure the cases of a world in fresh processes.

    Returns:
        None when every case was answered, else why the rest was not.

    Raises:
        ToolMissing, RunFailed: the interpreter or mpirun cannot be started.
    """
    launcher.logs.mkdir(parents=True, exist_ok=True)
    job = {
        "kind": "job",
        "cases": [asdict(case) for case in world.cases],
        "timing": asdict(timing),
        "seed": seed,
        "device": launcher.device,
    }
    with listening() as (listener, path), Ranks(world, launcher, path) as ranks:
        return _Parent(world, job, launcher, heard, listener, ranks).run()


class _Parent:
    """Hears the ranks until all cases are answered or the world is broken."""

    def __init__(
        self, world: World, job: dict[str, Any], launcher: Launcher, heard: Heard,
        listener: socket.socket, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._world, self._job, self._launcher, self._heard = world, job, launcher, heard
        self._ranks = ranks
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._listener = listener
        self._everyone = set(range(world.ranks))
        self._standing = False
        self._left: set[int] = set()  # ranks that have said that they end
        self._finished: dict[int, set[int]] = {}  # case → ranks that are through with it
        self._answers: dict[int, dict[str, Any] | str] = {}
        self._case = 0  # the first that is not answered
        self._broken: Broken | None = None
        self._blame_until = 0.0
        self._deadline = time.monotonic() + launcher.start_limit_s

    def run(self) -> Broken | None:
        with self._selector:
            while not self._over():
                heard = self._selector.select(POLL_S)
                for event, _ in heard:
                    if event.data is None:
                        self._admit(self._listener.accept()[0])
                    else:
                        self._hear(*event.data)
                if not heard:  # else a rank's last message may still be on its way
                    self._look_for_the_dead()
                self._look_at_the_clock()
        if self._broken is None or self._case >= len(self._world.cases):
            return None
        # Asked for only now: what other ranks had told of the case before may have come after.
        return replace(self._broken, case=self._case if self._standing else None)

    def _over(self) -> bool:
        if self._broken is not None:
            return time.monotonic() >= self._blame_until
        return self._left == self._everyone

    def _admit(self, connected: socket.socket) -> None:
        """A rank has connected; it says which one it is in its first message."""
        channel = Channel(connected)
        self._selector.register(connected, selectors.EVENT_READ, (channel, None))

    def _hear(self, channel: Channel, rank: int | None) -> None:
        messages = channel.receive()
        if messages is None:
            self._selector.unregister(channel.socket)
            channel.close()
            if rank is not None:
                del self._ranks.channels[rank]
                if rank not in self._left:
                    self._gone(rank)
            return
        for message in messages:
            if rank is None:
                rank = int(message["rank"])
                self._ranks.channels[rank] = channel
                self._ranks.pids[rank] = int(message["pid"])
                self._selector.modify(channel.socket, selectors.EVENT_READ, (channel, rank))
                if rank == 0 or "port" in self._job:
                    self._give_job(rank)
            else:
                self._understand(rank, message)

    def _give_job(self, rank: int) -> None:
        """Rank 0 gets its job first and answers with the store's port, which the others need."""
        job = {name: value for name, value in self._job.items() if rank or name != "port"}
        try:
            self._ranks.channels[rank].send(job)
        except OSError:  # it has died; its channel says so next
            return

    def _understand(self, rank: int, message: dict[str, Any]) -> None:
        kind, case = message["kind"], message.get("case")
        if kind == "port":
            self._job["port"] = int(message["port"])
            for other in [one for one in self._ranks.channels if one]:
                self._give_job(other)
        elif kind == "ready" and not self._standing:
            self._standing = True  # a rank says so once all have joined
            self._deadline = time.monotonic() + self._launcher.case_limit_s
        elif kind == "start" and rank == 0:
            self._heard.started(int(message["case"]))
        elif kind == "done":
            if rank == 0:
                self._answers[int(message["case"])] = message["answer"]
            self._through(rank, int(message["case"]))
        elif kind == "fault" and message["fault"] == Fault.WRONG and case is not None:
            self._answers[int(case)] = str(message["error"])
            self._through(rank, int(case))
        elif kind == "fault":
            self._left.add(rank)
            self._break(Fault(message["fault"]), f"rank {rank}: {message['error']}")
        elif kind == GARBLED:
            self._break(Fault.ERROR, f"rank {rank} said what cannot be read: {message['text']}")
        elif kind == "end":
            self._left.add(rank)

    def _through(self, rank: int, case: int) -> None:
        """A case counts once every rank is through with it."""
        done = self._finished.setdefault(case, set())
        done.add(rank)
        if done == self._everyone and case == self._case:
            self._case += 1
            self._deadline = time.monotonic() + self._launcher.case_limit_s
            self._heard.answered(case, self._answers.pop(case))

    def _gone(self, rank: int) -> None:
        """A rank's channel has closed before its time: its process has ended, or soon will have."""
        until = time.monotonic() + BLAME_S
        code = None
        while not self._launcher.mpirun and code is None and time.monotonic() < until:
            code = self._ranks.exit_code(rank)
            time.sleep(0.01)
        self._died(rank, "has closed its channel" if code is None else how_it_ended(code))

    def _look_for_the_dead(self) -> None:
        """Processes that ended without a word: a rank's guard may keep its channel open."""
        for rank in self._ranks.processes:
            code = self._ranks.exit_code(rank)
            if code is not None and rank not in self._left:
                self._died(rank, how_it_ended(code))

    def _died(self, rank: int, how: str) -> None:
        if self._broken is not None and self._broken.fault is Fault.CRASH:
            return  # others follow the first
        said = last_words(self._ranks.log(rank))
        self._broken = None  # a death explains what others may have told of it
        self._break(Fault.CRASH, f"rank {rank} {how}{f'; its last words: {said}' if said else ''}")

    def _look_at_the_clock(self) -> None:
        if self._broken is not None or time.monotonic() < self._deadline:
            return
        if not self._standing:
            limit = self._launcher.start_limit_s
            silent = self._everyone - set(self._ranks.pids)
            who = f"; nothing was heard of {_ranks_text(silent)}" if silent else ""
            self._break(Fault.TIMEOUT, f"the world did not stand after {limit:g} s{who}")
            return
        late = self._everyone - self._finished.get(self._case, set())
        limit = self._launcher.case_limit_s
        self._break(Fault.TIMEOUT, f"not finished after {limit:g} s: {_ranks_text(late)}")

    def _break(self, fault: Fault, error: str) -> None:
        if self._broken is not None:
            return
        self._broken = Broken(None, fault, error)
        self._blame_until = time.monotonic() + (BLAME_S if fault is not Fault.TIMEOUT else 0.0)


def _ranks_text(ranks: set[int]) -> str:
    names = ", ".join(str(rank) for rank in sorted(ranks))
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"
