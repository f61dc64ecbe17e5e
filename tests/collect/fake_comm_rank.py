"""A rank without torch: speaks the protocol of ``opkit.collect.comm.rank`` and fails as it is told.

``FAKE_COMM`` is JSON: by size of a case (``start`` for the start of the world) what one rank does
there: ``die``, ``hang``, ``memory``, ``garbage``; all ranks: ``wrong``. A plan ending in ``-once``
does so only the first time. ``rank`` says which one (default 1).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opkit.collect.comm.channel import RANK_VARIABLE, Channel, connect
from opkit.collect.measurement import Measurement, Timing
from opkit.collect.work import Fault
from opkit.collect.workers.tether import tether

PLAN = json.loads(os.environ["FAKE_COMM"])
NOTES = Path(os.environ["FAKE_COMM_NOTES"])  # what happened, over all processes


def told(where: str) -> str:
    """What to do at a size or at the start."""
    plan = str(PLAN.get(where, ""))
    what = plan.removesuffix("-once")
    if what in ("", "wrong"):
        return what
    if int(os.environ[RANK_VARIABLE]) != PLAN.get("rank", 1):
        return ""
    mark = NOTES / f"did-{where}"
    if plan.endswith("-once") and mark.exists():
        return ""
    mark.touch()
    return what


def act(what: str, channel: Channel, case: int | None) -> None:
    """Fail."""
    if what == "die":
        print("a fake rank dies", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(3600)
    if what == "garbage":
        channel.socket.sendall(b"this is no message\n")
        time.sleep(3600)
    if what == "memory":
        channel.send(
            {"kind": "fault", "case": case, "fault": Fault.MEMORY, "error": "OutOfMemoryError: x"}
        )
        time.sleep(3600)


def meet(where: str, rank: int, ranks: int) -> None:
    """Wait for the other ranks of this world, as those of a real one do in a collective."""
    world = Path(sys.argv[1]).parent.name
    (NOTES / f"{world}-{where}-{rank}").touch()
    while not all((NOTES / f"{world}-{where}-{other}").exists() for other in range(ranks)):
        time.sleep(0.002)


def answer(case: dict[str, Any], timing: Timing, ranks: int) -> dict[str, Any]:
    """A measurement: a time that grows with the size."""
    each = 0.01 + case["size"] * 1e-8
    samples = tuple(each * (1 + 0.001 * (number % 5)) for number in range(20))
    measured = Measurement(elapsed_ms=samples, timing=timing, stopped="spread")
    return {
        "measurement": asdict(measured),
        "served_by": "fake",
        "launches": 20,
        "rank_ms": [each] * ranks,
    }


def main() -> None:
    rank = int(os.environ[RANK_VARIABLE])
    channel = connect(sys.argv[1])
    tether(os.getppid(), channel.socket.fileno())
    with (NOTES / "pids").open("a") as file:
        file.write(f"{os.getpid()}\n")
    channel.send({"kind": "hello", "rank": rank, "pid": os.getpid()})
    job = channel.wait_for_one()
    if rank == 0:
        channel.send({"kind": "port", "port": 1})
    act(told("start"), channel, None)
    meet("ready", rank, job["cases"][0]["ranks"])
    channel.send({"kind": "ready"})
    for number, case in enumerate(job["cases"]):
        meet(str(number), rank, case["ranks"])
        channel.send({"kind": "start", "case": number})
        what = told(str(case["size"]))
        act(what, channel, number)
        if what == "wrong":
            fault = {"fault": Fault.WRONG, "error": "rank 0, launch 0: 1 of 8 elements are wrong"}
            channel.send({"kind": "fault", "case": number, **fault})
            continue
        done = answer(case, Timing(**job["timing"]), case["ranks"]) if rank == 0 else None
        channel.send({"kind": "done", "case": number, "answer": done})
    channel.send({"kind": "end"})
    while channel.receive() is not None:
        pass


if __name__ == "__main__":
    main()
