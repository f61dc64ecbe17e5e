"""How a rank times a case: aligned batches, the slowest rank of each, until the median is sure.

One sample is one batch: its launches between two events (on a CPU: the monotonic clock), divided by
their number. Before each batch the ranks are aligned on their GPUs: a wait long enough for every
host to have queued what follows, then a collective of one element. The slowest rank's time counts,
since no rank can go on before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from opkit.collect.comm.backends import Backend
from opkit.collect.comm.collectives import (
    Collective,
    WrongResult,
    check,
    fill_for_check,
    fill_for_timing,
    spoil,
)
from opkit.collect.comm.plan import CommCase, launches
from opkit.collect.measurement import Measurement, Timing
from opkit.collect.timing.stats import half_width, median
from opkit.collect.workers.faults import describe
from opkit.layers.op import LaunchMode
from opkit.sensors.nvml import THROTTLES, Gpu
from opkit.sensors.state import GpuState

BLOCK = 10  # batches between two looks at the spread
# How long the GPUs wait so that every host gets ahead of them. A graph is queued in some 10 µs, a
# collective of torch.distributed in some 30 µs.
LEAD_SECONDS = 200e-6
LEAD_SECONDS_A_LAUNCH = 50e-6
GPU_HERTZ = 2e9  # of the counter that torch.cuda._sleep waits for; no GPU's is much faster


class Party:
    """One rank among others: what it holds, and talk over the store of the process group.

    Args:
        torch: the module.
        store: a ``torch.distributed`` store of this world's own.
        device: this rank's.
        gpu: NVML's view of it, which knows nothing of a CPU.
    """

    def __init__(
        self, torch: Any, store: Any, device: Any, gpu: Gpu, rank: int, ranks: int
    ) -> None:
        self.torch, self.device, self.gpu = torch, device, gpu
        self.rank, self.ranks = rank, ranks
        self._store = store
        self._turn = 0

    @property
    def on_gpu(self) -> bool:
        """Whether there are streams, events and graphs."""
        return bool(self.device.type == "cuda")

    def exchange(self, value: Any) -> list[Any]:
        """Tell all ranks a JSON-ready value; return everyone's, by rank. Waits for all of them."""
        self._turn += 1
        self._store.set(f"{self._turn}/{self.rank}", json.dumps(value))
        told = [json.loads(self._store.get(f"{self._turn}/{other}")) for other in range(self.ranks)]
        # All have answered this turn, so all have read the one before.
        if self._turn > 1:
            self._store.delete_key(f"{self._turn - 1}/{self.rank}")
        return told

    def settle(self) -> None:
        """Wait for this rank's device."""
        if self.on_gpu:
            self.torch.cuda.synchronize()


def measure(
    party: Party, backend: Backend, case: CommCase, timing: Timing, seed: int
) -> dict[str, Any]:
    """Check one case, then time it. All ranks call it together.

    Returns:
        ``measurement`` (JSON), ``served_by``, ``launches`` in a batch, ``rank_ms`` (each rank's own
        median). The samples are the slowest rank's of each batch.

    Raises:
        WrongResult: at every rank, when the result is wrong at any.
    """
    torch = party.torch
    collective = backend.collective(case)
    fill_for_check(torch, collective, case, party.rank, seed)
    run, graph_error = _launcher(party, backend, collective, case)
    spoil(torch, collective)
    collective.refill()
    run()
    party.settle()
    _agree_on_result(party, collective, case, seed)
    fill_for_timing(torch, collective, party.rank, seed)
    graphed = case.launch is LaunchMode.GRAPH and not graph_error
    batch = _batch(party, collective, run, launches(case), _lead(case, graphed))
    samples = _sample(party, batch, timing)
    measured = Measurement(
        elapsed_ms=tuple(samples.slowest),
        launch=LaunchMode.GRAPH if graphed else LaunchMode.EAGER,
        timing=timing,
        warmups=timing.warmups,
        stopped=samples.stopped,
        graph_error=graph_error,
        before=samples.before,
        after=samples.after,
        throttled=samples.throttled,
    )
    return {
        "measurement": asdict(measured),
        "served_by": backend.served_by(collective),
        "launches": launches(case),
        "rank_ms": party.exchange(median(samples.mine)),
    }


def _launcher(
    party: Party, backend: Backend, collective: Collective, case: CommCase
) -> tuple[Callable[[], None], str]:
    """What runs one batch: the replay of a graph, or, where some rank cannot capture it, launches.

    Returns:
        The function, and why a graph that was wanted could not be captured.
    """
    # Once outside any graph: connections between ranks are made at the first use.
    collective.launch()
    party.settle()
    if case.launch is not LaunchMode.GRAPH:
        return collective.launch, ""
    graph, error = None, ""
    try:
        graph = _capture(party, backend, collective)
    except RuntimeError as refused:
        error = describe(refused)
        party.settle()
    errors = [f"rank {rank}: {why}" for rank, why in enumerate(party.exchange(error)) if why]
    if errors or graph is None:
        return collective.launch, errors[0]
    return graph.replay, ""


def _capture(party: Party, backend: Backend, collective: Collective) -> Any:
    """A CUDA graph of one batch. RuntimeError when CUDA or the library refuses."""
    cuda = party.torch.cuda
    graph = cuda.CUDAGraph()
    # Thread-local, as nccl-tests captures: the watchdog thread of torch's NCCL may query events
    # meanwhile, which a global capture forbids (pytorch/pytorch#104555).
    with (
        backend.capturing() as stream,
        cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        collective.launch()
    party.settle()
    return graph


def _agree_on_result(party: Party, collective: Collective, case: CommCase, seed: int) -> None:
    wrong = ""
    try:
        check(party.torch, collective, case, party.rank, seed)
    except WrongResult as error:
        wrong = str(error)
    told = [why for why in party.exchange(wrong) if why]
    if told:
        raise WrongResult(told[0])


def _lead(case: CommCase, graphed: bool) -> float:
    """Seconds that the GPUs wait for their hosts before a batch.

    An eager case that was asked for is timed as an eager engine has it, launches included. One that
    only could not be captured is to measure the collective, so its launches are hidden.
    """
    if case.launch is LaunchMode.EAGER:
        return 0.0
    return LEAD_SECONDS + (0.0 if graphed else launches(case) * LEAD_SECONDS_A_LAUNCH)


def _batch(
    party: Party, collective: Collective, run: Callable[[], None], count: int, lead: float
) -> Callable[[], float]:
    """A function that runs one aligned batch and returns milliseconds a launch at this rank."""
    torch = party.torch
    distributed = torch.distributed
    token = torch.zeros(1, device=party.device)

    def on_gpu() -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        collective.refill()
        if lead:
            torch.cuda._sleep(int(lead * GPU_HERTZ))
        distributed.all_reduce(token)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / count

    def on_cpu() -> float:
        collective.refill()
        distributed.barrier()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3 / count

    return on_gpu if party.on_gpu else on_cpu


@dataclass
class _Samples:
    """Milliseconds a launch, one of each batch: the slowest rank's, and this rank's own.

    ``before`` and ``after`` are the state of this rank's GPU; ``throttled`` is true when any rank's
    clock was lowered for power or heat at the end of any block.
    """

    before: GpuState
    slowest: list[float] = field(default_factory=list)
    mine: list[float] = field(default_factory=list)
    after: GpuState = field(default_factory=GpuState)
    throttled: bool = False
    stopped: str = ""


def _sample(party: Party, batch: Callable[[], float], timing: Timing) -> _Samples:
    """Batches until :func:`_reason` finds one to stop; all ranks decide alike."""
    for _ in range(timing.warmups):
        batch()
    made = _Samples(party.gpu.state())
    began = time.monotonic()
    while not made.stopped:
        block = [batch() for _ in range(min(BLOCK, timing.max_iterations - len(made.mine)))]
        made.after = party.gpu.state()
        slowed = bool(THROTTLES.intersection(made.after.throttle))
        told = party.exchange([block, time.monotonic() - began, slowed])
        made.mine += block
        made.slowest += [max(times) for times in zip(*(one[0] for one in told), strict=True)]
        made.throttled |= any(one[2] for one in told)
        made.stopped = _reason(made.slowest, max(one[1] for one in told), timing)
    return made


def _reason(samples: list[float], seconds: float, timing: Timing) -> str:
    """Why to stop after these samples: ``spread``, ``iterations`` or ``time``; empty to go on."""
    if len(samples) >= timing.min_iterations:
        if half_width(samples) <= timing.spread:
            return "spread"
        if seconds >= timing.max_seconds:
            return "time"
    return "iterations" if len(samples) >= timing.max_iterations else ""
