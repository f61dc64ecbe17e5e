"""Which of a row's two times a table gets, and what a reader of the table must know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from opkit.collect.measurement import Measurement
from opkit.collect.timing.measure import host_bound
from opkit.collect.timing.stats import median
from opkit.layers.op import LaunchMode

SETTLED = "spread"  # why iterations ended, when they ended as they should


class Latency(StrEnum):
    """Which time a table gets."""

    AUTO = "auto"
    ELAPSED = "elapsed"
    GPU = "gpu"


class Flag(StrEnum):
    """What a measurement alone tells. Others join them in the table: see docs/tables.md."""

    HOST_BOUND = "host_bound"
    THROTTLED = "throttled"
    EAGER_FALLBACK = "eager_fallback"
    NO_GPU_TIME = "no_gpu_time"
    KERNELS_UNKNOWN = "kernels_unknown"
    UNSETTLED = "unsettled"


@dataclass(frozen=True)
class Chosen:
    """The time that a table gets.

    Attributes:
        ms: milliseconds; NaN when the measurement has no samples.
        source: ``elapsed`` or ``gpu``.
        samples: what it is the median of, milliseconds.
        flags: what is to be known of it.
    """

    ms: float
    source: Latency
    samples: tuple[float, ...]
    flags: tuple[Flag, ...]


def choose(measurement: Measurement, latency: Latency = Latency.AUTO) -> Chosen:
    """Choose.

    ``auto`` takes elapsed time of a graph, whose gaps the engine has too, and GPU time of an eager
    launch, whose gaps are the host's. GPU time that was not taken is replaced by elapsed time, and
    the row says so.
    """
    eager = measurement.launch is LaunchMode.EAGER
    wants_gpu = latency is Latency.GPU or (latency is Latency.AUTO and eager)
    source = Latency.GPU if wants_gpu and measurement.gpu_ms else Latency.ELAPSED
    samples = measurement.gpu_ms if source is Latency.GPU else measurement.elapsed_ms
    told = {
        Flag.HOST_BOUND: bool(host_bound(measurement)),
        Flag.THROTTLED: measurement.throttled,
        Flag.EAGER_FALLBACK: bool(measurement.graph_error),
        Flag.NO_GPU_TIME: wants_gpu and not measurement.gpu_ms,
        Flag.KERNELS_UNKNOWN: not measurement.kernels,
        Flag.UNSETTLED: measurement.stopped not in ("", SETTLED),
    }
    flags = tuple(flag for flag, on in told.items() if on)
    return Chosen(median(samples) if samples else math.nan, source, samples, flags)
