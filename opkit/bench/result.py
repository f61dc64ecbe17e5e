"""What a benchmark found, as plain data: one row a test, what all rows share, what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.bench.measure import Measured
from opkit.bench.plan import BenchOptions
from opkit.bench.recorder import mean_watts
from opkit.bench.stats import deviation, mean, percentile
from opkit.sensors.levels import Sensors

SCHEMA = "opkit.bench/1"
_NS = 1e9
# A stretch whose speed is so far from the repetitions' is told: its joules are of another pace.
# Repetitions on an H100 differed by 1 to 5 %.
_APART = 0.05


@dataclass(frozen=True)
class Row:
    """One test's result. ``docs/bench.md`` defines every key; None: not known, and never 0.

    The keys from ``test_type`` to ``data_file`` are those that the field's benchmark of
    TensorRT-LLM engines writes, which took them from ``llama-bench``.
    """

    model: str
    backend: str
    engine_version: str
    gpu: str
    test: str
    test_type: str
    n_prompt: int
    n_gen: int
    n_batch: int
    n_tokens: int
    repetitions: int
    avg_ns: int
    stddev_ns: int | None
    avg_ts: float
    stddev_ts: float | None
    samples_ns: tuple[int, ...]
    data_file: str
    ttft_avg_ns: int | None
    ttft_stddev_ns: int | None
    ttft_samples_ns: tuple[int, ...]
    itl_avg_ns: int | None
    itl_stddev_ns: int | None
    itl_samples_ns: tuple[int, ...]
    itl_p50_ns: int | None
    itl_p99_ns: int | None
    watts: float | None
    joules_per_token: float | None
    power_method: str
    power_scope: str
    power_ns: int | None
    power_repetitions: int | None
    temp_start_c: float | None
    temp_max_c: float | None
    clock_avg_mhz: float | None
    clock_min_mhz: float | None
    throttle: tuple[str, ...]
    cached_tokens: int | None
    warmups: int
    started: str
    interrupted: bool
    notes: tuple[str, ...] = ()
    power_ts: float | None = None


@dataclass(frozen=True)
class Failure:
    """A test, or a whole model, that gave no number, and why in a sentence."""

    model: str
    backend: str
    test: str
    why: str


@dataclass(frozen=True)
class Context:
    """What all rows of one model share, as plain data."""

    model: str
    backend: str
    engine_version: str
    timed_by: str
    engine: dict[str, Any]
    sensors: dict[str, Any]
    options: dict[str, Any]


@dataclass
class Bench:
    """A whole run.

    Attributes:
        started: UTC, ISO 8601.
        folder: where its files are.
    """

    opkit: str
    started: str
    folder: str
    models: list[Context] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    interrupted: bool = False

    def as_json(self) -> dict[str, Any]:
        """The JSON object that is written and printed."""
        return {
            "schema": SCHEMA,
            "opkit": self.opkit,
            "started": self.started,
            "folder": self.folder,
            "interrupted": self.interrupted,
            "models": [asdict(each) for each in self.models],
            "results": [asdict(each) for each in self.rows],
            "failures": [asdict(each) for each in self.failures],
        }


def make_row(
    measured: Measured,
    options: BenchOptions,
    served: Served,
    sensors: Sensors,
    data_file: str,
    notes: Sequence[str] = (),
) -> Row:
    """The result of one test, from its repetitions and what the sensors showed."""
    test, turns = measured.test, measured.turns
    samples = [turn.ended_ns - turn.began_ns for turn in turns]
    speeds = [test.n_tokens * _NS / sample for sample in samples]
    ttft = [value for turn in turns if (value := _ttft_ns(turn)) is not None]
    itl = [value for turn in turns if (value := _itl_ns(turn)) is not None]
    gaps = [gap for turn in turns for reply in turn.replies for gap in reply.gaps]
    each = [(ns / count, count) for ns, count in gaps if count > 0]
    power = _power(measured, sensors)
    return Row(
        model=options.name or served.model,
        backend=options.backend,
        engine_version=served.version,
        gpu=gpu_names(sensors),
        test=test.label,
        test_type=test.kind.value,
        n_prompt=test.n_prompt,
        n_gen=test.n_gen,
        n_batch=test.n_batch,
        n_tokens=test.n_tokens,
        repetitions=len(turns),
        avg_ns=round(mean(samples) or 0),
        stddev_ns=_rounded(deviation(samples)),
        avg_ts=mean(speeds) or 0.0,
        stddev_ts=deviation(speeds),
        samples_ns=tuple(samples),
        data_file=data_file,
        ttft_avg_ns=_rounded(mean(ttft)),
        ttft_stddev_ns=_rounded(deviation(ttft)),
        ttft_samples_ns=tuple(round(value) for value in ttft),
        itl_avg_ns=_rounded(mean(itl)),
        itl_stddev_ns=_rounded(deviation(itl)),
        itl_samples_ns=tuple(round(value) for value in itl),
        itl_p50_ns=_rounded(percentile(each, 0.50)),
        itl_p99_ns=_rounded(percentile(each, 0.99)),
        **power,
        **_heat(measured, sensors),
        cached_tokens=_cached(turns),
        warmups=measured.warmups,
        started=utc(measured.stretch[0] + measured.shift_ns),
        interrupted=measured.interrupted,
        notes=(*notes, *_notes(measured, sensors, power, mean(speeds) or 0.0)),
    )


def gpu_names(sensors: Sensors) -> str:
    """The GPUs or the board whose sensors are read, as ``2x NVIDIA H100``; empty: unknown."""
    facts = sensors.facts()
    names = [str(gpu["name"]) for gpu in facts.get("gpus", ())]
    kinds = {name: names.count(name) for name in names}
    text = ", ".join(f"{count}x {name}" if count > 1 else name for name, count in kinds.items())
    return text or str(facts.get("board", ""))


def utc(unix_ns: int) -> str:
    """A time as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(unix_ns // 10**9, UTC).isoformat().replace("+00:00", "Z")


def _ttft_ns(turn: Turn) -> float | None:
    """Time to first token of one repetition: the mean over its requests."""
    firsts = [reply.first_ns for reply in turn.replies]
    known = [first - turn.began_ns for first in firsts if first is not None]
    return mean(known) if len(known) == len(firsts) else None


def _itl_ns(turn: Turn) -> float | None:
    """Time between two tokens of one repetition: the mean over its requests."""
    each = [_between(reply) for reply in turn.replies]
    known = [value for value in each if value is not None]
    return mean(known) if len(known) == len(each) else None


def _between(reply: Reply) -> float | None:
    """From a request's first tokens to its last, over the tokens that came after the first."""
    later = reply.tokens - reply.first_tokens
    if later < 1 or reply.first_ns is None or reply.last_ns is None:
        return None
    return (reply.last_ns - reply.first_ns) / later


def _power(measured: Measured, sensors: Sensors) -> dict[str, Any]:
    meter = sensors.meter()
    began, ended = measured.stretch
    runs = len(measured.turns) + len(measured.more)
    watts = mean_watts(measured.track.readings, meter, began, ended) if meter else None
    seconds, tokens = (ended - began) / _NS, runs * measured.test.n_tokens
    return {
        "watts": watts,
        "power_ts": None if watts is None else tokens / seconds,
        "joules_per_token": None if watts is None else watts * seconds / tokens,
        "power_method": meter.method if meter else "",
        "power_scope": sensors.scope,
        "power_ns": None if watts is None else ended - began,
        "power_repetitions": None if watts is None else runs,
    }


def _heat(measured: Measured, sensors: Sensors) -> dict[str, Any]:
    """The hottest of the GPUs, and the mean and least of their core clocks."""
    levels = measured.track.within(*measured.stretch)
    began, _ = measured.stretch
    before = [each for at, each in measured.track.levels if at <= began][-1:]
    start, heat = (
        [max(known) for each in some if (known := _of(each.temp, sensors.heat))]
        for some in (before, levels)
    )
    clocks = [mhz for each in levels for mhz in _of(each.freq, sensors.clock)]
    return {
        "temp_start_c": next(iter(start + heat), None),
        "temp_max_c": max(start + heat, default=None),
        "clock_avg_mhz": mean(clocks),
        "clock_min_mhz": min(clocks, default=None),
        "throttle": tuple(sorted({why for each in levels for why in each.throttle})),
    }


def _of(values: Any, names: Sequence[str]) -> list[float]:
    return [values[name] for name in names if name in values]


def _cached(turns: Sequence[Turn]) -> int | None:
    """Prompt tokens that came from a prefix cache, all repetitions together."""
    told = [reply.cached for turn in turns for reply in turn.replies]
    known = [value for value in told if value is not None]
    return sum(known) if known else None


def _notes(
    measured: Measured, sensors: Sensors, power: Mapping[str, Any], speed: float
) -> list[str]:
    """What a reader of the numbers must know."""
    said = []
    watts, whole = power["watts"], power["power_ts"]
    if whole is not None and abs(whole - speed) > _APART * speed:
        said.append(
            f"power is of {power['power_repetitions']} runs at {whole:,.0f} tokens/s, rests "
            f"between them included; the repetitions made {speed:,.0f}"
        )
    if measured.failed is not None:
        said.append("power is of a shorter stretch, since a run after the repetitions failed")
    if cached := _cached(measured.turns):
        said.append(f"{cached:,} prompt tokens came from the engine's prefix cache")
    if sensors.meter() is not None and watts is None:
        said.append("no mean power: too few readings, or none for a while; see --power-seconds")
    if any(reply.first_ns is None for turn in measured.turns for reply in turn.replies):
        said.append("the engine did not tell when the first token was there")
    return said


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)
