"""The process of one rank: ``python -m opkit.collect.comm.rank SOCKET``, started by ``world``.

It joins its world, measures the cases in lock-step with the other ranks, and tells its parent.
To it: ``job`` (cases, timing, seed, device; ``port`` of the store, but for rank 0). From it:
``hello`` (rank, pid), ``port`` (rank 0), ``ready``, then for each case ``start``, and ``done``
(rank 0: with the answer) or ``fault``; ``end``. After a fault other than a wrong result the other
ranks may wait for ever, so the parent ends the world.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from datetime import timedelta
from typing import Any

from opkit.collect.comm.backends import make_backend
from opkit.collect.comm.channel import RANK_VARIABLE, Channel, connect
from opkit.collect.comm.collectives import WrongResult
from opkit.collect.comm.measure import Party, measure
from opkit.collect.comm.plan import CommCase
from opkit.collect.measurement import Timing
from opkit.collect.work import Fault
from opkit.collect.workers.faults import describe, fault_of
from opkit.collect.workers.tether import tether
from opkit.layers.op import LaunchMode
from opkit.sensors.nvml import Gpu, open_gpu

HOST = "127.0.0.1"
# The parent decides what takes too long; nothing in here gives up before it.
PATIENCE = timedelta(days=1)


def main() -> None:
    """Entry point."""
    rank = int(os.environ.get(RANK_VARIABLE) or os.environ["OMPI_COMM_WORLD_RANK"])
    channel = connect(sys.argv[1])
    tether(os.getppid(), channel.socket.fileno())
    channel.send({"kind": "hello", "rank": rank, "pid": os.getpid()})
    job = channel.wait_for_one()
    try:
        _work(channel, job, rank)
    except Exception as error:
        traceback.print_exc()
        channel.send(_fault(error, None))
    # The parent ends all ranks together: rank 0 holds the store that the others may still read, and
    # destroying communicators in order can wait for ever.
    while channel.receive() is not None:
        pass
    os._exit(0)


def _work(channel: Channel, job: dict[str, Any], rank: int) -> None:
    torch = importlib.import_module("torch")
    cases = [CommCase(**{**case, "launch": LaunchMode(case["launch"])}) for case in job["cases"]]
    ranks = cases[0].ranks
    party = _join(torch, channel, job, rank, ranks)
    backend = make_backend(torch, party.device, rank, cases)
    party.exchange("ready")
    channel.send({"kind": "ready"})
    timing = Timing(**job["timing"])
    for number, case in enumerate(cases):
        channel.send({"kind": "start", "case": number})
        try:
            answer = measure(party, backend, case, timing, job["seed"])
        except WrongResult as error:  # all ranks agree on it, so the world goes on
            channel.send(_fault(error, number))
            continue
        except Exception as error:
            traceback.print_exc()
            channel.send(_fault(error, number))
            return
        channel.send({"kind": "done", "case": number, "answer": answer if rank == 0 else None})
    channel.send({"kind": "end"})


def _join(torch: Any, channel: Channel, job: dict[str, Any], rank: int, ranks: int) -> Party:
    """Join the process group of the world, over a store that rank 0 holds."""
    distributed = torch.distributed
    on_gpu = job["device"] == "cuda"
    device = torch.device(f"cuda:{rank}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    # Port 0: the kernel chooses a free one, so that no other program can take it in between.
    store = distributed.TCPStore(
        HOST, job.get("port", 0), ranks, is_master=rank == 0, timeout=PATIENCE,
        wait_for_workers=False,
    )  # fmt: skip
    if rank == 0:
        channel.send({"kind": "port", "port": store.port})
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=distributed.PrefixStore("group", store),
        rank=rank,
        world_size=ranks,
        timeout=PATIENCE,
        device_id=device if on_gpu else None,
    )
    uuid = str(torch.cuda.get_device_properties(device).uuid) if on_gpu else ""
    # torch leaves out the prefix.
    gpu = open_gpu(f"GPU-{uuid.removeprefix('GPU-')}") if uuid else Gpu()
    talk = distributed.PrefixStore("opkit", store)
    return Party(torch, talk, device, gpu, rank, ranks)


def _fault(error: Exception, case: int | None) -> dict[str, Any]:
    if isinstance(error, WrongResult):
        return {"kind": "fault", "case": case, "fault": Fault.WRONG, "error": str(error)}
    return {"kind": "fault", "case": case, "fault": fault_of(error), "error": describe(error)}


if __name__ == "__main__":
    main()
