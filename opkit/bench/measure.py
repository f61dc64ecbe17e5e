"""One test: warmed up, repeated, and kept going until its power is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from opkit.bench.backends.backend import Backend, Turn
from opkit.bench.clock import Clock
from opkit.bench.plan import BenchTest
from opkit.bench.prompts import Prompts
from opkit.bench.recorder import Record, Track
from opkit.errors import OpkitError
from opkit.sensors.levels import Sensors

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much is done for one test. See :class:`opkit.bench.plan.BenchOptions`."""

    repetitions: int
    warmup: int
    power_s: float
    sample_ms: int


@dataclass
class Measured:
    """What one test gave.

    Attributes:
        turns: the timed repetitions.
        more: those after them, only to measure power for longer.
        warmups: untimed runs before.
        track: the sensors from the first repetition to the last of ``more``.
        shift_ns: from the monotonic clock to ns since 1970.
        interrupted: Ctrl-C ended it; ``turns`` are those that had ended.
        failed: what ended ``more`` too early; the repetitions are whole.
    """

    test: BenchTest
    turns: list[Turn] = field(default_factory=list)
    more: list[Turn] = field(default_factory=list)
    warmups: int = 0
    track: Track = field(default_factory=Track)
    shift_ns: int = 0
    interrupted: bool = False
    failed: OpkitError | None = None

    @property
    def stretch(self) -> tuple[int, int]:
        """The time over which power is averaged: ns, from the first repetition to the very last."""
        return self.turns[0].began_ns, (self.more or self.turns)[-1].ended_ns


def measure(
    test: BenchTest,
    effort: Effort,
    backend: Backend,
    prompts: Prompts,
    sensors: Sensors,
    clock: Clock,
    record: Record,
    say: Say,
) -> Measured:
    """Run one test.

    Every run has prompts of its own, so that no prefix cache can answer. Repetitions follow one
    another without a rest: power is averaged over all of them.

    Raises:
        RunFailed: the engine failed before the last repetition had ended; later it is noted in the
            result.
        KeyboardInterrupt: before the first repetition had ended; later it is noted in the result.
    """
    done = Measured(test)
    meter = sensors.meter()

    def turn(name: str) -> Turn:
        asked = [prompts(f"{test.label} {name} {n}", test.sent) for n in range(test.n_batch)]
        return backend.generate(asked, test.asked)

    say(f"{test.label}: warming up")
    for number in range(effort.warmup):
        turn(f"warm-up {number}")
        done.warmups += 1
    if effort.warmup and meter is not None:
        settled = clock.now_ns() + meter.lead * 1e9
        while clock.now_ns() < settled:
            turn(f"warm-up {done.warmups}")
            done.warmups += 1
    try:
        with record(sensors, effort.sample_ms) as done.track:
            say(f"{test.label}: {effort.repetitions} repetitions")
            done.shift_ns = clock.unix_ns() - clock.now_ns()
            for number in range(effort.repetitions):
                done.turns.append(turn(f"{number}"))
            end = done.turns[0].began_ns + effort.power_s * 1e9
            try:
                while meter is not None and clock.now_ns() < end:
                    done.more.append(turn(f"more {len(done.more)}"))
            except OpkitError as error:
                done.failed = error
    except KeyboardInterrupt:
        if not done.turns:
            raise
        done.interrupted = True
    return done
