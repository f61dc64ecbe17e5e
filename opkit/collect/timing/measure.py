"""Measure one case: warm up, iterate until the median is known well enough, look at the kernels.

What is measured and why each constant has its value: ``docs/timing.md``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from opkit.collect.measurement import L2_STATES, PACINGS, Measurement, Power, Timing
from opkit.collect.timing.device import Device, Forward, Pace
from opkit.collect.timing.kernel_times import Trace
from opkit.collect.timing.power import measure_power
from opkit.collect.timing.stats import deviation, half_width, median
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode
from opkit.sensors.nvml import THROTTLES
from opkit.sensors.state import GpuState

# Burst: rest 3 times as long as the work, so that the GPU works a quarter of the time and its mean
# power stays far below the limit: 7 ms of an H100's prefill took equally long after rests of 20 and
# of 50 ms (docs/development.md). More than 60 buys nothing. Iterations below 1 ms draw too little,
# too briefly, to lower the clock.
REST_RATIO = 3
LONGEST_REST = 0.060  # seconds
SHORTEST_RESTED = 0.001  # seconds of an iteration

# The GPU is kept busy this long before what is timed, as the layer before would keep it busy: the
# first launch from Python and the start of a graph take 10 to 60 µs, which are no part of the op.
FIRST_LEAD = 100e-6  # seconds
LONGEST_LEAD = 10e-3  # seconds; a graph whose launch takes longer than that is not hidden

STEADY = 0.95  # warm-up is over when an iteration is not below this share of the one before
MOST_WARMUPS = 20
SETTLED = 0.01  # sustained: two batches in a row whose medians and clocks differ by less
SETTLE_BATCH = 0.05  # seconds of one such batch: several periods of the GPU's power control
LEAST_MORE = 4  # further iterations at a time, at least

LONG = 0.020  # seconds of an iteration from which fewer of them have to do
LEAST_LONG = 5  # iterations of a long case: what a confidence interval needs
TRACE_SECONDS = 0.3  # that the first traced pass may take, beyond its least iterations
LEAST_TRACED = 3
# An eager row's value is its GPU time. Its elapsed time tells how far the host holds it up, and
# jitters by tens of percent where it does: a few iterations say as much as many.
EAGER_TIMED = 5
SURELY_BUSY = 0.005  # seconds: no host needs as long for the launches of one layer
POWER_CAP = "SwPowerCap"
CAPPED = 0.97  # of the highest clock: the power limit is often touched without cost to the clock
CLOCK_DROP = 0.9  # a clock below this share of the one before: throttled
HOST_BOUND = 0.85  # GPU time below this share of elapsed; gaps between kernels explain the rest


@dataclass
class _Run:
    """One case in hand; the functions below fill it in, in their order."""

    forward: Forward
    timing: Timing
    device: Device
    launch: LaunchMode
    clock: Callable[[], float]
    seconds: float = 0.0  # of one iteration
    busy: float | None = None  # seconds of one iteration in which the GPU works, if known
    host_seconds: float = math.inf  # that one launch of it takes the host
    warmups: int = 0
    notes: list[str] = field(default_factory=list)
    states: list[GpuState] = field(default_factory=list)

    def look(self) -> None:
        """Ask NVML, while iterations run."""
        self.states.append(self.device.sensors.state())

    def pace(self, count: int) -> Pace:
        """How ``count`` iterations follow each other."""
        rest = self.rest()
        lead = FIRST_LEAD
        if self.launch is LaunchMode.GRAPH and not rest and math.isfinite(self.host_seconds):
            # A graph shorter than its own launch would be timed as the launch; in an engine the
            # layer is part of one large graph. So all launches are queued before the first starts.
            lead += min(count * self.host_seconds, LONGEST_LEAD)
        return Pace(rest, self.timing.l2 == "cold", lead)

    def rest(self) -> float:
        """Seconds of rest before an iteration."""
        busy = self.seconds if self.busy is None else self.busy
        if self.timing.pacing != "burst" or busy < SHORTEST_RESTED:
            return 0.0
        return min(REST_RATIO * busy, LONGEST_REST)

    def least(self) -> int:
        """Measured iterations, at least."""
        least = self.timing.min_iterations
        return min(least, LEAST_LONG) if self.seconds >= LONG else least

    def batch(self, count: int, during: Callable[[], None] | None = None) -> list[float]:
        """Time ``count`` iterations, milliseconds."""
        return self.device.time(self.forward, count, self.pace(count), during)


def measure(
    forward: Forward,
    timing: Timing,
    device: Device,
    launch: LaunchMode = LaunchMode.EAGER,
    graph_error: str = "",
    clock: Callable[[], float] = time.perf_counter,
    by_elapsed: bool = False,
) -> Measurement:
    """Measure one case.

    Args:
        forward: launches one iteration and returns without waiting for it.
        timing: how.
        device: where; its own clock times the iterations.
        launch: what ``forward`` does: launch kernels one by one, or replay a graph.
        graph_error: why it does not replay a graph, although one was asked for.
        clock: seconds; bounds how long all of this takes.
        by_elapsed: elapsed time is the value of an eager launch too, so it decides when to stop.

    Returns:
        All samples, none dropped. With several readings of the GPU's state ``after`` is the last
        throttled one, or simply the last.

    Raises:
        BadInput: ``timing`` cannot be followed.
        Exception: whatever ``forward`` raises.
    """
    _check(timing)
    run = _Run(forward, timing, device, launch, clock)
    _warm_up(run)
    if timing.pacing == "sustained":
        _settle(run)
    before, run.states = run.states[-1], []
    if timing.gpu_time and launch is LaunchMode.EAGER and not by_elapsed:
        samples, trace, stopped = _eager(run)
    else:
        samples, stopped = _iterate(run)
        trace = _trace(run) if timing.gpu_time else Trace()
    top = device.sensors.highest_sm_mhz()
    slowed = [state for state in run.states if _throttled(before, state, top)]
    power = _power(run) if timing.power else None
    return Measurement(
        elapsed_ms=tuple(samples),
        gpu_ms=trace.gpu_ms,
        launch=launch,
        kernels=trace.kernels,
        timing=timing,
        warmups=run.warmups,
        stopped=stopped,
        graph_error=graph_error,
        before=before,
        after=(slowed or run.states)[-1],
        throttled=bool(slowed),
        power=power,
        notes=tuple(run.notes) + ((trace.problem,) if trace.problem else ()),
    )


def host_bound(measurement: Measurement) -> bool | None:
    """Whether the GPU waited for the host's launches: eager, and much more elapsed than GPU time.

    Returns:
        None when GPU time was not taken.
    """
    if not measurement.gpu_ms:
        return None
    if measurement.launch is LaunchMode.GRAPH:
        return False
    return median(measurement.gpu_ms) < HOST_BOUND * median(measurement.elapsed_ms)


def _warm_up(run: _Run) -> None:
    """Single iterations until they no longer get faster; learns how long one takes."""
    forward = run.forward
    launching = 0.0

    def watched() -> None:
        nonlocal launching
        began = run.clock()
        forward()
        launching = run.clock() - began
        run.host_seconds = min(run.host_seconds, launching)

    needed = max(1, run.timing.warmups)
    most = max(needed, MOST_WARMUPS)
    began = run.clock()
    last = fastest = math.inf
    while run.warmups < most:
        run.warmups += 1
        during = run.look if run.warmups in (1, needed) else None  # the first may be the only one
        cold = run.timing.l2 == "cold"
        (taken,) = run.device.time(watched, 1, Pace(cold=cold, lead=FIRST_LEAD), during)
        steady, last, fastest = taken >= STEADY * last, taken, min(fastest, taken)
        late = run.clock() - began >= run.timing.max_seconds
        if taken >= 1e3 * LONG and 1e3 * launching < taken / 2:  # else: it compiled
            needed = min(needed, run.warmups)
        if run.warmups >= needed and (steady or late or needed == 1):
            break
    # What a host adds to an eager launch jitters, and only ever adds.
    run.seconds = (fastest if run.launch is LaunchMode.EAGER else last) / 1e3


def _settle(run: _Run) -> None:
    """Batches back to back until clock and time no longer change, ``max_seconds`` at most."""
    count = _fitting(SETTLE_BATCH, run.seconds)
    began = run.clock()
    last, last_mhz = math.inf, None
    while run.clock() - began < run.timing.max_seconds:
        middle = median(run.batch(count, run.look))
        run.warmups += count
        mhz = run.states[-1].sm_mhz
        steady = abs(deviation(middle, last)) < SETTLED
        if mhz is not None and last_mhz is not None:
            steady = steady and abs(deviation(mhz, last_mhz)) < SETTLED
        last, last_mhz = middle, mhz
        run.seconds = middle / 1e3
        if steady:
            return
    run.notes.append(f"clock and time had not settled after {run.timing.max_seconds:g} s")


def _eager(run: _Run) -> tuple[list[float], Trace, str]:
    """Traced iterations until the median GPU time is known to ``spread``, then a few timed ones.

    Returns:
        The elapsed samples in milliseconds, the traced passes as one, and why they ended.
    """
    if run.rest() and run.seconds < SURELY_BUSY:
        # Much of the time may be the host's, and a GPU that waits needs no rest.
        probe = run.device.trace(run.forward, LEAST_TRACED, Pace(cold=run.timing.l2 == "cold"), 1)
        run.busy = median(probe.gpu_ms) / 1e3 if probe.gpu_ms else None
    timing = run.timing
    began = run.clock()
    trace, stopped = _trace(run), "spread"
    first = len(trace.gpu_ms)
    while trace.gpu_ms and half_width(trace.gpu_ms) > timing.spread:
        have, used = len(trace.gpu_ms), run.clock() - began
        if have >= timing.max_iterations:
            stopped = "iterations"
            break
        if used >= timing.max_seconds:
            stopped = "time"
            break
        left = math.ceil((timing.max_seconds - used) / max(used / have, 1e-9))
        more = _trace(run, min(max(first, have // 2), timing.max_iterations - have, left))
        problem = trace.problem or more.problem
        if not more.gpu_ms:
            trace, stopped = replace(trace, problem=problem), "trace"
            break
        trace = replace(more, gpu_ms=trace.gpu_ms + more.gpu_ms, problem=problem)
    if not trace.gpu_ms:
        samples, stopped = _iterate(run)
        return samples, trace, stopped
    if timing.pacing == "sustained":
        # The GPU idled while the profiler was stopped, and its clock recovered.
        run.batch(_fitting(SETTLE_BATCH, run.seconds))
    return run.batch(min(EAGER_TIMED, run.least()), run.look), trace, stopped


def _iterate(run: _Run) -> tuple[list[float], str]:
    """Iterations until the median is known to ``spread``, or a bound is reached.

    Returns:
        The samples in milliseconds, and why they ended.
    """
    timing = run.timing
    samples: list[float] = []
    began = run.clock()
    count = run.least()
    while True:
        samples += run.batch(count, run.look)
        width = half_width(samples)
        used = run.clock() - began
        if width <= timing.spread:
            return samples, "spread"
        if len(samples) >= timing.max_iterations:
            return samples, "iterations"
        if used >= timing.max_seconds:
            return samples, "time"
        left = (timing.max_seconds - used) / max(used / len(samples), 1e-9)
        count = _more(len(samples), width / timing.spread if timing.spread else math.inf)
        count = max(1, min(count, timing.max_iterations - len(samples), math.ceil(left)))


def _more(have: int, excess: float) -> int:
    """Iterations to add when the spread is ``excess`` times what it should be.

    The spread falls with the root of the number. But it is itself known badly, and one outlier
    among the first few looks like much spread: so at most half as many again at a time.
    """
    wanted = have * min(excess, 2.0) ** 2 - have
    return max(LEAST_MORE, min(have // 2, math.ceil(wanted)))


def _trace(run: _Run, count: int = 0) -> Trace:
    """An untimed pass that records kernels, in the pacing of the timed one.

    Args:
        run: the case.
        count: iterations; 0: as many as fit, within bounds.
    """
    pace = replace(run.pace(1), lead=0.0)
    fitting = _fitting(TRACE_SECONDS, run.seconds + pace.rest)
    least = LEAST_LONG if run.launch is LaunchMode.EAGER else LEAST_TRACED
    count = count or max(least, min(run.timing.min_iterations, fitting))
    before = 1 if run.timing.pacing == "burst" else _fitting(SETTLE_BATCH, run.seconds)
    return run.device.trace(run.forward, count, pace, before)


def _power(run: _Run) -> Power | None:
    """Power, or None and a note that says why there is none."""
    power, problem = measure_power(run.forward, run.device, run.timing.power_seconds, run.seconds)
    if problem:
        run.notes.append(problem)
    return power


def _throttled(before: GpuState, after: GpuState, highest_mhz: int | None) -> bool:
    """Whether heat, hardware or the power limit lowered the clock, or it fell by over a tenth."""
    reasons = THROTTLES.intersection(after.throttle)
    if reasons - {POWER_CAP}:
        return True
    if after.sm_mhz is None:
        return bool(reasons)
    if reasons and (highest_mhz is None or after.sm_mhz < CAPPED * highest_mhz):
        return True
    return before.sm_mhz is not None and after.sm_mhz < CLOCK_DROP * before.sm_mhz


def _fitting(seconds: float, each: float) -> int:
    """How many iterations of ``each`` seconds begin within ``seconds``: 1 to 1,000."""
    return max(1, min(1000, math.ceil(seconds / each))) if each > 0 else 1000


def _check(timing: Timing) -> None:
    """Raise BadInput, naming the field, unless ``timing`` can be followed."""
    if timing.pacing not in PACINGS:
        raise BadInput(f"pacing must be one of {', '.join(PACINGS)}, not {timing.pacing!r}")
    if timing.l2 not in L2_STATES:
        raise BadInput(f"l2 must be one of {', '.join(L2_STATES)}, not {timing.l2!r}")
    if not 1 <= timing.min_iterations <= timing.max_iterations:
        raise BadInput("min_iterations must be at least 1 and at most max_iterations")
    if timing.warmups < 0 or timing.spread < 0 or timing.max_seconds < 0:
        raise BadInput("warmups, spread and max_seconds must not be negative")
