"""A device whose iterations take what a test says, on a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from opkit.collect.measurement import KernelTime, Measurement, Timing
from opkit.collect.timing.device import Pace, Run
from opkit.collect.timing.kernel_times import Trace
from opkit.collect.timing.measure import measure
from opkit.sensors.nvml import Gpu
from opkit.sensors.state import GpuState

BACK_TO_BACK = Pace()
BUSY = GpuState(1980, 2619, 45, 400.0)
GEMM = KernelTime("gemm", 1, 900.0)
LOST = Trace(problem="GPU time not taken: 0 of 16 markers were traced")


class FakeGpu(Gpu):
    """Gives the states that a test lists, the last one again and again."""

    def __init__(self, *states: GpuState, highest_mhz: int | None = 1980) -> None:
        super().__init__()
        self.states = list(states) or [BUSY]
        self.highest_mhz = highest_mhz

    def state(self) -> GpuState:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def highest_sm_mhz(self) -> int | None:
        return self.highest_mhz


@dataclass
class Batch:
    """One call of ``time``."""

    count: int
    pace: Pace
    observed: bool


@dataclass
class FakeDevice:
    """``times`` gives the milliseconds of each iteration; the last one is repeated.

    ``gpu`` does the same for the GPU time of traced iterations, which take as long as the last
    timed one did. ``traced`` says what the first traced passes give instead.
    """

    times: Iterator[float]
    sensors: FakeGpu = field(default_factory=FakeGpu)
    host_ms: float = 0.0  # that launching takes
    gpu: Iterator[float] = field(default_factory=lambda: iter([0.9]))
    traced: Iterator[Trace] = field(default_factory=lambda: iter(()))
    name: str = "Fake GPU"
    uuid: str = "GPU-fake"
    index: int = 0
    now: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    traces: list[tuple[int, Pace, int]] = field(default_factory=list)
    runs: list[tuple[float, int]] = field(default_factory=list)
    freed: int = 0
    last: float = 1.0
    last_gpu: float = 0.9

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
            self.now += self.last / 1e3 + pace.rest
        given = next(self.traced, None)
        return given if given is not None else Trace(self._gpu_times(count), (GEMM,))

    def _gpu_times(self, count: int) -> tuple[float, ...]:
        samples = []
        for _ in range(count):
            self.last_gpu = next(self.gpu, self.last_gpu)
            samples.append(self.last_gpu)
        return tuple(samples)

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


def fake(
    times: Iterable[float],
    *states: GpuState,
    host_ms: float = 0.0,
    gpu: Iterable[float] = (0.9,),
    traced: Iterable[Trace] = (),
) -> FakeDevice:
    return FakeDevice(iter(times), FakeGpu(*states), host_ms, gpu=iter(gpu), traced=iter(traced))


def counts(device: FakeDevice) -> list[int]:
    """Iterations of each timed batch."""
    return [batch.count for batch in device.batches]


def traced_counts(device: FakeDevice) -> list[int]:
    """Iterations of each traced pass."""
    return [count for count, _, _ in device.traces]


def run(device: FakeDevice, timing: Timing, **more: object) -> Measurement:
    def forward() -> None:
        device.now += device.host_ms / 1e3

    return measure(forward, timing, device, clock=device.clock, **more)  # type: ignore[arg-type]
