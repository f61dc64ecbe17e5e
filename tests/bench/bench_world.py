"""A benchmark without an engine or a GPU: a clock that stands still, and what moves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.bench.clock import Clock
from opkit.bench.plan import BenchOptions
from opkit.bench.recorder import Track
from opkit.errors import OpkitError
from opkit.sensors.levels import Levels, Sensors
from opkit.sensors.meter import Meter

MS = 1_000_000
SECOND = 1_000_000_000
UNIX = 1_700_000_000 * SECOND


class Time:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.ns = 5 * SECOND
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.ns += round(seconds * SECOND)

    def clock(self) -> Clock:
        return Clock(lambda: self.ns, lambda: UNIX + self.ns, self.sleep)


@dataclass
class FakeBackend:
    """An engine whose prefill takes 0.01 ms a token and whose decode step takes 1 ms.

    Attributes:
        fails: what a call of that number raises, counted from 0.
        dies: after a failure it is dead.
    """

    time: Time
    served: Served = field(
        default_factory=lambda: Served("m", "9.9", vocab=1000, max_length=4096, timed_by="a fake")
    )
    fails: dict[int, BaseException] = field(default_factory=dict)
    dies: bool = False
    refuses: OpkitError | None = None
    calls: list[tuple[list[list[int]], int]] = field(default_factory=list)
    closed: int = 0

    def start(self) -> Served:
        if self.refuses is not None:
            raise self.refuses
        return self.served

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Turn:
        self.calls.append(([list(prompt) for prompt in prompts], output))
        if error := self.fails.get(len(self.calls) - 1):
            raise error
        began = self.time.ns
        first = began + sum(map(len, prompts)) * MS // 100
        self.time.ns = first + (output - 1) * MS
        gaps = ((MS, 1),) * (output - 1)
        reply = Reply(first, self.time.ns, output, gaps=gaps, cached=0)
        return Turn(began, self.time.ns, (reply,) * len(prompts))

    def alive(self) -> bool:
        return not self.dies

    def close(self) -> None:
        self.closed += 1


@dataclass
class FakeSensors:
    """One GPU that draws ``watts`` and is as warm as ``heats`` say, one after the other."""

    watts: float = 400.0
    heats: list[float] = field(default_factory=lambda: [50.0])
    kind: str = "nvml"
    scope: str = "whole board of GPU 0"
    heat: tuple[str, ...] = ("GPU 0",)
    clock: tuple[str, ...] = ("GPU 0 SM",)
    throttle: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        return {"gpus": [{"index": 0, "name": "NVIDIA H100"}], "driver": "580.1"}

    def levels(self) -> Levels:
        now = self.heats.pop(0) if len(self.heats) > 1 else self.heats[0]
        return Levels(
            {"GPU 0": self.watts}, {"GPU 0": now}, {"GPU 0 SM": 1980.0, "GPU 0 memory": 2619.0},
            self.throttle,
        )  # fmt: skip

    def meter(self) -> Meter | None:
        return Meter("energy counter", lambda: 0.0, True, 0.3)


def recording_at(time: Time, step_ms: int = 20) -> Callable[..., Any]:
    """A recorder whose energy counter moves every ``step_ms``, at the watts of the sensors."""

    @contextmanager
    def record(sensors: Sensors, _sample_ms: int) -> Iterator[Track]:
        track, began = Track(), time.ns
        track.levels.append((began, sensors.levels()))
        yield track
        track.levels.append((time.ns, sensors.levels()))
        if sensors.meter() is not None:
            watts = sum(sensors.levels().power.values())
            steps = range(0, (time.ns - began) // MS + 1, step_ms)
            track.readings += [(began / SECOND + ms / 1000, watts * ms / 1000) for ms in steps]

    return record


def options(**given: Any) -> BenchOptions:
    """Options of a small run."""
    return BenchOptions(**{"backend": "vllm", "model": "m", **given})
