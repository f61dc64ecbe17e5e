"""Where cases run and what takes their time: a CUDA device by its events, or the CPU by its clock.

A device does what it is told, iteration by iteration; how many, with which rests, is decided in
:mod:`opkit.collect.timing.measure`.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from opkit.collect.timing.kernel_times import Activity, Trace, summarise
from opkit.errors import ToolMissing
from opkit.sensors.nvml import Gpu, open_gpu

_LOG = logging.getLogger(__name__)

Forward = Callable[[], Any]

# The kernel of torch.cuda._sleep: one thread that watches the clock, so it draws no power and
# leaves caches alone. No op launches it, which makes it a marker too.
_MARKER = "spin_kernel"
_CYCLES_PER_SECOND = 2e9  # of the fastest GPUs of today; a slower one waits longer
_IN_FLIGHT = 2  # chunks queued ahead while running for a time: the GPU never waits for the host
_CPU_SWEEP = 32 * 2**20  # bytes read for a "cold" iteration on a CPU: more than a core's share


@dataclass(frozen=True)
class Pace:
    """How iterations follow each other.

    Attributes:
        rest: seconds in which the device is idle before each iteration; 0: back to back.
        cold: read twice the L2 cache before each iteration.
        lead: seconds for which the GPU is kept busy with nothing, so that the host gets ahead of
            it: before each iteration after a rest, before the first one when back to back.
    """

    rest: float = 0.0
    cold: bool = False
    lead: float = 0.0


@dataclass(frozen=True)
class Run:
    """Iterations run back to back, and the seconds that they took."""

    iterations: int
    seconds: float


class Device(Protocol):
    """See the module's docstring.

    Attributes:
        name: as the vendor writes it.
        uuid: as NVML writes it, ``GPU-…``; empty for a CPU.
        index: number among the process's own devices; -1 for a CPU.
        sensors: its clocks, temperature and power, as far as NVML tells.
    """

    name: str
    uuid: str
    index: int
    sensors: Gpu

    def synchronize(self) -> None:
        """Wait until all that was launched is done."""

    def time(
        self,
        forward: Forward,
        count: int,
        pace: Pace = Pace(),  # frozen
        during: Forward | None = None,
    ) -> list[float]:
        """Run ``count`` iterations; return the time of each, milliseconds.

        Args:
            forward: one iteration.
            count: how many.
            pace: see :class:`Pace`; rests, sweeps and leads are not in the times.
            during: called once, when the last iteration has been launched and may still run.
        """

    def trace(self, forward: Forward, count: int, pace: Pace, before: int = 1) -> Trace:
        """Run ``before`` and then ``count`` iterations, and record the kernels of the latter."""

    def run(self, forward: Forward, seconds: float, chunk: int) -> Run:
        """Run iterations back to back for at least ``seconds``, queued in chunks of ``chunk``."""

    def memory(self) -> tuple[int, int]:
        """Free and total memory, bytes; zeros for a CPU."""

    def free_memory(self) -> None:
        """Give unused cached memory back."""

    def close(self) -> None:
        """Let go of all that was made for measuring."""


class CudaDevice:
    """One CUDA device, timed by events on torch's current stream.

    Args:
        index: number among the devices that ``CUDA_VISIBLE_DEVICES`` leaves.
        torch: the module, or what stands in for it.
        sensors: default: found by the device's UUID.
        clock, sleep: in seconds, as :func:`time.perf_counter` and :func:`time.sleep`.
    """

    def __init__(
        self,
        index: int,
        torch: Any,
        sensors: Gpu | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._torch = torch
        self._clock, self._sleep = clock, sleep
        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.name = str(properties.name)
        uuid = str(properties.uuid)  # torch leaves out the prefix
        self.uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self.sensors = sensors if sensors is not None else open_gpu(self.uuid)
        self._l2_bytes = int(properties.L2_cache_size)
        self._sweep_buffer: Any = None
        self._events: list[tuple[Any, Any]] = []

    def synchronize(self) -> None:
        """See :class:`Device`."""
        self._torch.cuda.synchronize(self.index)

    def time(
        self,
        forward: Forward,
        count: int,
        pace: Pace = Pace(),  # frozen
        during: Forward | None = None,
    ) -> list[float]:
        """See :class:`Device`. The GPU's timeline between two events around each iteration.

        Back to back nothing waits between iterations; with a rest each one is awaited first, or
        there would be no rest.
        """
        pairs = self._event_pairs(count)
        self.synchronize()
        for number, (start, end) in enumerate(pairs):
            self._prepare(pace, pace.lead if number == 0 or pace.rest else 0.0)
            start.record()
            forward()
            end.record()
            if during is not None and number == count - 1:
                during()
            if pace.rest:
                self.synchronize()
        self.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def trace(self, forward: Forward, count: int, pace: Pace, before: int = 1) -> Trace:
        """See :class:`Device`. CUPTI by torch's profiler; only activities of the GPU are recorded.

        CUPTI's own teardown after each pass is turned off: it is slow, runs in another thread, and
        was known to crash CUDA graphs (pytorch/pytorch#144455). It stays loaded, with nothing
        enabled.
        """
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        self.synchronize()
        recorder = self._torch.autograd.profiler.profile(
            use_kineto=True, use_cpu=False, use_device="cuda"
        )
        with recorder:
            for _ in range(before):
                self._prepare(pace)
                forward()
            for _ in range(count):
                self._prepare(pace)
                self._spin(0)
                forward()
                self._spin(0)
                if pace.rest:
                    self.synchronize()
            self.synchronize()
        cuda = self._torch.autograd.DeviceType.CUDA
        events = (e for e in recorder.kineto_results.events() if e.device_type() == cuda)
        activities = [Activity(e.name(), e.start_ns(), e.duration_ns()) for e in events]
        return summarise(activities, _MARKER, count)

    def run(self, forward: Forward, seconds: float, chunk: int) -> Run:
        """See :class:`Device`."""
        pending: deque[Any] = deque()
        done = 0
        self.synchronize()
        began = self._clock()
        while self._clock() - began < seconds:
            for _ in range(chunk):
                forward()
            done += chunk
            reached = self._torch.cuda.Event()
            reached.record()
            pending.append(reached)
            if len(pending) > _IN_FLIGHT:
                pending.popleft().synchronize()
        self.synchronize()
        return Run(done, self._clock() - began)

    def memory(self) -> tuple[int, int]:
        """See :class:`Device`."""
        free, total = self._torch.cuda.mem_get_info(self.index)
        return int(free), int(total)

    def free_memory(self) -> None:
        """See :class:`Device`."""
        self.synchronize()
        self._torch.cuda.empty_cache()

    def close(self) -> None:
        """See :class:`Device`."""
        self._events.clear()
        self._sweep_buffer = None

    def _prepare(self, pace: Pace, lead: float = 0.0) -> None:
        """What comes before an iteration and is not in its time."""
        if pace.rest:
            self._sleep(pace.rest)
        if lead:
            self._spin(lead)
        if pace.cold:
            self._sweep()

    def _spin(self, seconds: float) -> None:
        """Queue a kernel that does nothing for ``seconds``."""
        self._torch.cuda._sleep(max(1, int(seconds * _CYCLES_PER_SECOND)))

    def _sweep(self) -> None:
        """Queue a read of twice the L2 cache's size."""
        if self._sweep_buffer is None:
            elements = 2 * self._l2_bytes // 4  # of 4 bytes
            self._sweep_buffer = self._torch.zeros(
                elements, dtype=self._torch.float32, device=f"cuda:{self.index}"
            )
        self._sweep_buffer.sum()

    def _event_pairs(self, count: int) -> list[tuple[Any, Any]]:
        """``count`` pairs of timing events, made once and used again."""
        event = self._torch.cuda.Event
        while len(self._events) < count:
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
        return self._events[:count]


class CpuDevice:
    """The CPU, timed by the host's clock: the same code paths, without GPU numbers."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self.name = platform.processor() or platform.machine() or "CPU"
        self.uuid = ""
        self.index = -1
        self.sensors = Gpu()
        self._swept = b""

    def synchronize(self) -> None:
        """See :class:`Device`: a CPU is done when the call returns."""

    def time(
        self,
        forward: Forward,
        count: int,
        pace: Pace = Pace(),  # frozen
        during: Forward | None = None,
    ) -> list[float]:
        """See :class:`Device`."""
        samples = []
        for _ in range(count):
            if pace.rest:
                self._sleep(pace.rest)
            if pace.cold:
                self._swept = self._swept or bytes(_CPU_SWEEP)
                self._swept.count(1)  # reads all of it
            began = self._clock()
            forward()
            samples.append(1e3 * (self._clock() - began))
        if during is not None:
            during()
        return samples

    def trace(self, forward: Forward, count: int, pace: Pace, before: int = 1) -> Trace:  # noqa: ARG002
        """See :class:`Device`: a CPU has no kernels."""
        return Trace()

    def run(self, forward: Forward, seconds: float, chunk: int) -> Run:
        """See :class:`Device`."""
        done = 0
        began = self._clock()
        while self._clock() - began < seconds:
            for _ in range(chunk):
                forward()
            done += chunk
        return Run(done, self._clock() - began)

    def memory(self) -> tuple[int, int]:
        """See :class:`Device`."""
        return 0, 0

    def free_memory(self) -> None:
        """See :class:`Device`."""

    def close(self) -> None:
        """See :class:`Device`."""
        self._swept = b""


def open_device(index: int = 0, kind: str = "auto") -> Device:
    """The device that this process measures on.

    On CUDA the first, slow start of CUPTI happens here, so that the first case is timed under the
    same conditions as the others and does not pay for it.

    Args:
        index: number among the devices that ``CUDA_VISIBLE_DEVICES`` leaves.
        kind: ``cuda``, ``cpu``, or ``auto``: CUDA where torch has it.

    Raises:
        ToolMissing: ``cuda`` was asked for and is not there.
    """
    if kind == "cpu":
        return CpuDevice()
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        if kind == "cuda":
            raise ToolMissing(f"no CUDA: torch cannot be imported ({error})") from error
        return CpuDevice()
    if not torch.cuda.is_available():
        if kind == "cuda":
            raise ToolMissing("torch sees no CUDA device", hint="see nvidia-smi")
        return CpuDevice()
    torch.cuda.set_device(index)
    device = CudaDevice(index, torch)
    cell = torch.zeros(1, device=f"cuda:{index}")
    problem = device.trace(lambda: cell.add_(1), 1, Pace()).problem
    if problem:
        _LOG.warning("%s: %s", device.name, problem)
    return device
