"""What was measured of one case, as plain data: samples, and how they came about."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from opkit.errors import BadInput
from opkit.layers.op import LaunchMode
from opkit.sensors.state import GpuState

PACINGS = ("burst", "sustained")
L2_STATES = ("warm", "cold")


@dataclass(frozen=True)
class Timing:
    """How to measure. Part of a row's content key: another way of measuring is another row.

    Attributes:
        pacing: ``burst`` lets the GPU rest before each iteration, as at low load; ``sustained``
            runs iterations back to back until clock and power have settled, as at high load.
        l2: ``warm`` leaves in the L2 cache what the last iteration left there; ``cold`` reads
            twice its size before each iteration.
        warmups: least iterations before the measured ones.
        min_iterations, max_iterations: bounds on the measured iterations (5 at least for cases of
            20 ms and more).
        spread: iterations go on until the 95 % confidence half-width of the median is at most this
            share of it: of elapsed time for graphs, of GPU time for eager launches.
        max_seconds: measured and paused time of one case, at most (at least ``min_iterations``).
        gpu_time: also take the kernels' own times (CUPTI, in a pass that is not timed).
        power: also measure power.
        power_seconds: least duration of the power measurement, seconds.
    """

    pacing: str = "burst"
    l2: str = "warm"
    warmups: int = 3
    min_iterations: int = 8
    max_iterations: int = 200
    spread: float = 0.0025
    max_seconds: float = 1.0
    gpu_time: bool = True
    power: bool = False
    power_seconds: float = 1.0


@dataclass(frozen=True)
class Power:
    """Power drawn while the case ran over and over.

    Attributes:
        watts: mean over the run.
        limit_watts: the GPU's power limit.
        joules_per_iteration: energy of one iteration.
        method: ``energy counter``, ``sampling of instantaneous power`` or ``sampling of the 1 s
            average``.
        seconds: duration of the run.
        samples: samples taken (0 with the energy counter).
        overhead: own overhead: time of the iterations with measuring over without, minus one.
    """

    watts: float
    limit_watts: float | None
    joules_per_iteration: float
    method: str
    seconds: float
    samples: int
    overhead: float | None = None


@dataclass(frozen=True)
class KernelTime:
    """One kernel of the op at one case: ``calls`` per forward, ``us`` summed over them (median)."""

    name: str
    calls: int
    us: float


@dataclass(frozen=True)
class Measurement:
    """One case measured.

    Attributes:
        elapsed_ms: one sample an iteration: GPU timeline between events around it, milliseconds.
        gpu_ms: one sample an iteration of the untimed pass: sum of its kernels' times; empty when
            it was not taken.
        launch: eager, or graph (replayed).
        kernels: what the untimed pass saw, largest first.
        timing: how it was asked for.
        warmups: iterations before the measured ones.
        stopped: why iterations ended: ``spread``, ``iterations`` or ``time``.
        graph_error: why a graph that was asked for could not be captured; empty otherwise.
        before, after: the GPU's state around the measured iterations.
        throttled: whether the clock was lowered while measuring, for power or heat.
        power: with ``--measure-power``.
        notes: what could not be measured, and what was odd.
    """

    elapsed_ms: tuple[float, ...]
    gpu_ms: tuple[float, ...] = ()
    launch: LaunchMode = LaunchMode.EAGER
    kernels: tuple[KernelTime, ...] = ()
    timing: Timing = field(default_factory=Timing)
    warmups: int = 0
    stopped: str = ""
    graph_error: str = ""
    before: GpuState = field(default_factory=GpuState)
    after: GpuState = field(default_factory=GpuState)
    throttled: bool = False
    power: Power | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; :func:`measurement_from_json` reads it back."""
        return asdict(self)


def measurement_from_json(data: dict[str, Any], origin: str) -> Measurement:
    """Read a measurement back.

    Raises:
        BadInput: ``data``, of ``origin``, is none.
    """
    try:
        return Measurement(
            **{
                **data,
                "elapsed_ms": tuple(float(value) for value in data["elapsed_ms"]),
                "gpu_ms": tuple(float(value) for value in data["gpu_ms"]),
                "launch": LaunchMode(data["launch"]),
                "kernels": tuple(KernelTime(**item) for item in data["kernels"]),
                "timing": Timing(**data["timing"]),
                "before": _state(data["before"]),
                "after": _state(data["after"]),
                "power": Power(**data["power"]) if data["power"] else None,
                "notes": tuple(data.get("notes", ())),
            }
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{origin}: not a readable measurement ({error})") from error


def _state(data: dict[str, Any]) -> GpuState:
    return GpuState(**{**data, "throttle": tuple(data["throttle"])})


def digest_text(data: Any) -> str:
    """JSON in which equal data is equal text: what content keys are made of."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))
