"""A device whose iterations take what a test says, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from opkit.collect.device import Pace, Run
from opkit.collect.kernel_times import Trace
from opkit.collect.measurement import GpuState, KernelTime
from opkit.collect.nvml import Gpu

BACK_TO_BACK = Pace()
BUSY = GpuState(1980, 2619, 45, 400.0)


class FakeGpu(Gpu):
    """Gives the states that a test lists, the last one again and again."""

    def __init__(self, *states: GpuState) -> None:
        super().__init__()
        self.states = list(states) or [BUSY]

    def state(self) -> GpuState:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]


@dataclass
class Batch:
    """One call of ``time``."""

    count: int
    pace: Pace
    observed: bool


@dataclass
class FakeDevice:
    """``times`` gives the milliseconds of each iteration; the last one is repeated."""

    times: Iterator[float]
    sensors: FakeGpu = field(default_factory=FakeGpu)
    host_ms: float = 0.0  # that launching takes
    trace_result: Trace = field(
        default_factory=lambda: Trace((0.9,) * 3, (KernelTime("gemm", 1, 900.0),))
    )
    name: str = "Fake GPU"
    uuid: str = "GPU-fake"
    index: int = 0
    now: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    traces: list[tuple[int, Pace, int]] = field(default_factory=list)
    runs: list[tuple[float, int]] = field(default_factory=list)
    freed: int = 0
    last: float = 1.0

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def synchronize(self) -> None:
        """Nothing runs."""

    def time(
        self,
        forward: Callable[[], object],
        count: int,
        pace: Pace = BACK_TO_BACK,
        during: Callable[[], None] | None = None,
    ) -> list[float]:
        self.batches.append(Batch(count, pace, during is not None))
        samples = []
        for _ in range(count):
            forward()
            self.last = next(self.times, self.last)
            self.now += self.last / 1e3 + pace.rest
            samples.append(self.last)
        if during is not None:
            during()
        return samples

    def trace(
        self, forward: Callable[[], object], count: int, pace: Pace, before: int = 1
    ) -> Trace:
        self.traces.append((count, pace, before))
        for _ in range(before + count):
            forward()
        return self.trace_result

    def run(self, forward: Callable[[], object], seconds: float, chunk: int) -> Run:
        self.runs.append((seconds, chunk))
        forward()
        self.now += seconds
        return Run(100, seconds)

    def memory(self) -> tuple[int, int]:
        return 0, 0

    def free_memory(self) -> None:
        self.freed += 1

    def close(self) -> None:
        """Nothing to let go of."""
