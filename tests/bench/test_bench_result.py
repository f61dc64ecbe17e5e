"""Numbers of a row, from times and readings that are known."""

from __future__ import annotations

from typing import Any

import pytest
from bench_world import MS, SECOND, UNIX, FakeSensors, options

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.bench.files import detail
from opkit.bench.measure import Measured
from opkit.bench.plan import BenchTest, Kind
from opkit.bench.recorder import Track
from opkit.bench.result import Row, gpu_names, make_row
from opkit.bench.stats import deviation, mean, percentile
from opkit.sensors.levels import Levels, NoSensors, Sensors

SERVED = Served("served", "1.2.3", timed_by="a fake")
T0 = 10 * SECOND


def turn(
    at_ms: float,
    took_ms: float,
    first_ms: float | None,
    tokens: int,
    requests: int = 1,
    **more: Any,
) -> Turn:
    """One run that began ``at_ms`` after T0."""
    began = T0 + round(at_ms * MS)
    first = None if first_ms is None else began + round(first_ms * MS)
    last = None if first_ms is None else began + round(took_ms * MS)
    reply = Reply(first, last, tokens, **more)
    return Turn(began, began + round(took_ms * MS), (reply,) * requests)


def row(test: BenchTest, turns: list[Turn], sensors: Sensors | None = None, **more: Any) -> Row:
    measured = Measured(test, turns=turns, shift_ns=UNIX, **more)
    return make_row(measured, options(), SERVED, sensors or NoSensors(), "detail.json")


def test_speed_is_the_mean_of_each_repetition_s() -> None:
    """1,000 tokens in 10 and 20 ms: 100,000 and 50,000 tokens/s; not 2,000 in 30 ms."""
    found = row(BenchTest(Kind.PROMPT, 1000, 0), [turn(0, 10, 10, 1), turn(20, 20, 20, 1)])
    assert found.samples_ns == (10 * MS, 20 * MS)
    assert (found.avg_ns, found.repetitions, found.n_tokens) == (15 * MS, 2, 1000)
    assert found.stddev_ns == 7_071_068  # 5 ms off on each side, over n - 1
    assert found.avg_ts == pytest.approx(75_000)
    assert found.stddev_ts == pytest.approx(35_355.339)


def test_one_repetition_has_no_deviation() -> None:
    found = row(BenchTest(Kind.PROMPT, 1000, 0), [turn(0, 10, 10, 1)])
    assert (found.stddev_ns, found.stddev_ts, found.ttft_stddev_ns) == (None, None, None)


def test_a_batch_counts_all_its_tokens() -> None:
    found = row(BenchTest(Kind.BOTH, 100, 28, 4), [turn(0, 100, 20, 28, requests=4)])
    assert found.n_tokens == 512
    assert found.avg_ts == pytest.approx(5120)


def test_first_token_and_the_time_between_tokens() -> None:
    """First after 20 ms, the other 10 in 80 ms."""
    found = row(BenchTest(Kind.BOTH, 100, 11), [turn(0, 100, 20, 11), turn(200, 120, 20, 11)])
    assert found.ttft_samples_ns == (20 * MS, 20 * MS)
    assert found.ttft_avg_ns == 20 * MS
    assert found.itl_samples_ns == (8 * MS, 10 * MS)
    assert found.itl_avg_ns == 9 * MS
    assert (found.itl_p50_ns, found.itl_p99_ns) == (None, None)


def test_tokens_that_came_with_the_first_are_not_between() -> None:
    found = row(BenchTest(Kind.BOTH, 100, 11), [turn(0, 100, 20, 11, first_tokens=3)])
    assert found.itl_avg_ns == 10 * MS


def test_one_token_has_nothing_between() -> None:
    found = row(BenchTest(Kind.PROMPT, 100, 0), [turn(0, 10, 10, 1)])
    assert (found.itl_avg_ns, found.itl_samples_ns) == (None, ())


def test_percentiles_weigh_chunks_by_their_tokens() -> None:
    """98 tokens of 1 ms, then a chunk of two tokens in 10 ms: 5 ms each."""
    gaps = ((MS, 1),) * 98 + ((10 * MS, 2),)
    found = row(BenchTest(Kind.GENERATION, 0, 101), [turn(0, 109, 1, 101, gaps=gaps)])
    assert (found.itl_p50_ns, found.itl_p99_ns) == (MS, 5 * MS)


def test_an_engine_that_does_not_tell_the_first_token() -> None:
    found = row(BenchTest(Kind.BOTH, 100, 11), [turn(0, 100, None, 11)])
    assert (found.ttft_avg_ns, found.itl_avg_ns) == (None, None)
    assert found.notes == ("the engine did not tell when the first token was there",)


def test_power_of_the_whole_stretch() -> None:
    """Two repetitions and a filling run, 300 ms at 400 W: 120 J for 3,000 tokens."""
    track = Track(
        levels=[
            (T0 - MS, Levels({}, {"GPU 0": 99.0}, {"GPU 0 SM": 1.0})),
            (T0, Levels({}, {"GPU 0": 50.0}, {"GPU 0 SM": 1980.0})),
            (T0 + 200 * MS, Levels({}, {"GPU 0": 60.0}, {"GPU 0 SM": 1900.0}, ("SwPowerCap",))),
        ],
        readings=[(10.0 + ms / 1000, 0.4 * ms) for ms in range(-40, 400, 20)],
    )
    turns = [turn(0, 100, 100, 1), turn(100, 100, 100, 1)]
    found = row(
        BenchTest(Kind.PROMPT, 1000, 0),
        turns,
        FakeSensors(),
        more=[turn(200, 100, 100, 1)],
        track=track,
    )
    assert found.watts == pytest.approx(400.0)
    assert found.joules_per_token == pytest.approx(120 / 3000)
    assert (found.power_ns, found.power_repetitions) == (300 * MS, 3)
    assert found.power_method == "energy counter"
    assert found.power_scope == "whole board of GPU 0"
    assert (found.temp_start_c, found.temp_max_c) == (50.0, 60.0)
    assert (found.clock_avg_mhz, found.clock_min_mhz) == (1940.0, 1900.0)
    assert found.throttle == ("SwPowerCap",)


def test_the_heat_at_the_start_is_what_was_read_just_before() -> None:
    """The recorder's first look comes a millisecond before the first repetition, its next 100 ms
    later: on an H100 a prompt test had warmed by several degrees until then."""
    heat = [(-100, 90.0), (-1, 41.0), (99, 45.0), (150, 44.0)]
    levels = [(T0 + ms * MS, Levels({}, {"GPU 0": celsius})) for ms, celsius in heat]
    found = row(
        BenchTest(Kind.PROMPT, 10, 0), [turn(0, 200, 200, 1)], FakeSensors(),
        track=Track(levels=levels),
    )  # fmt: skip
    assert (found.temp_start_c, found.temp_max_c) == (41.0, 45.0)


def powered(more_ms: float, gap_ms: float = 0.0) -> Row:
    """Two repetitions of 10 ms, then 40 runs of ``more_ms``, all of 1,000 tokens, at 400 W."""
    turns = [turn(0, 10, 10, 1), turn(10 + gap_ms, 10, 10, 1)]
    at = 20 + 2 * gap_ms
    more = [turn(at + n * (more_ms + gap_ms), more_ms, more_ms, 1) for n in range(40)]
    readings = [(10.0 + ms / 1000, 0.4 * ms) for ms in range(0, 1000, 20)]
    return row(
        BenchTest(Kind.PROMPT, 1000, 0), turns, FakeSensors(), more=more,
        track=Track(readings=readings),
    )  # fmt: skip


def test_joules_are_those_of_the_whole_stretch_and_so_is_its_speed() -> None:
    """420 ms of runs and 41 gaps of 0.5 ms: 42,000 tokens in 440.5 ms."""
    found = powered(10, 0.5)
    assert found.power_ts == pytest.approx(42_000 / 0.4405)
    assert found.watts is not None
    assert found.power_ts is not None
    assert found.joules_per_token == pytest.approx(found.watts / found.power_ts)
    assert found.notes == ()


def test_a_stretch_that_was_slower_than_the_repetitions_is_told() -> None:
    """As on an H100: 10 repetitions of 7.5 ms, then 217 runs of up to 9.8 ms."""
    assert powered(12).notes == (
        "power is of 42 runs at 84,000 tokens/s, rests between them included; "
        "the repetitions made 100,000",
    )


def test_too_few_readings_are_no_power() -> None:
    track = Track(readings=[(10.0, 1.0), (10.01, 5.0)])
    found = row(BenchTest(Kind.PROMPT, 10, 0), [turn(0, 10, 10, 1)], FakeSensors(), track=track)
    assert (found.watts, found.joules_per_token, found.power_ns) == (None, None, None)
    assert found.notes == (
        "no mean power: too few readings, or none for a while; see --power-seconds",
    )


def test_without_sensors_there_is_no_power_and_no_note() -> None:
    found = row(BenchTest(Kind.PROMPT, 10, 0), [turn(0, 10, 10, 1)])
    assert (found.watts, found.power_method, found.temp_max_c, found.gpu) == (None, "", None, "")
    assert found.notes == ()


def test_a_prefix_cache_that_answered_is_told() -> None:
    turns = [turn(0, 10, 10, 1, cached=16), turn(10, 10, 10, 1, cached=0)]
    found = row(BenchTest(Kind.PROMPT, 100, 0), turns)
    assert found.cached_tokens == 16
    assert found.notes == ("16 prompt tokens came from the engine's prefix cache",)


def test_what_was_run() -> None:
    found = row(BenchTest(Kind.GENERATION, 0, 8), [turn(0, 8, 1, 8)], FakeSensors())
    assert (found.model, found.backend, found.engine_version) == ("served", "vllm", "1.2.3")
    assert (found.gpu, found.test, found.test_type) == ("NVIDIA H100", "tg8", "generation")
    assert found.started == "2023-11-14T22:13:30Z"


def test_gpus_of_one_kind_are_counted() -> None:
    class Two(FakeSensors):
        def facts(self) -> dict[str, Any]:
            return {"gpus": [{"name": "H100"}, {"name": "H100"}, {"name": "A100"}]}

    assert gpu_names(Two()) == "2x H100, A100"


def test_detail_holds_the_field_s_keys() -> None:
    track = Track(
        levels=[(T0, Levels({"A": 1.0}, {"T": 2.0}, {"F": 3.0})), (T0 + 5, Levels({"A": 4.0}))],
        readings=[(10.0, 7.0)],
    )
    measured = Measured(
        BenchTest(Kind.BOTH, 5, 6),
        turns=[turn(0, 10, 4, 6)],
        more=[turn(10, 10, 4, 6)],
        track=track,
        shift_ns=UNIX,
    )
    found = detail(measured, FakeSensors(), 100)
    assert found["power"] == {
        "unit": "W", "sampling_duration_ms": 100,
        "timestamps": [UNIX + T0, UNIX + T0 + 5], "value": {"A": [1.0, 4.0]},
    }  # fmt: skip
    assert found["temp"]["value"] == {"T": [2.0, None]}
    assert found["freq"]["unit"] == "MHz"
    assert found["meter"] == {
        "method": "energy counter", "unit": "J", "timestamps": [UNIX + T0], "value": [7.0],
    }  # fmt: skip
    first, second = found["time"]
    assert first == {
        "n_p_eval": 5, "n_eval": 6, "rep_id": 0,
        "start_time_ns": UNIX + T0, "end_time_ns": UNIX + T0 + 10 * MS,
        "first_token_ns": [UNIX + T0 + 4 * MS], "last_token_ns": [UNIX + T0 + 10 * MS],
        "tokens": [6],
    }  # fmt: skip
    assert second["rep_id"] == -1


@pytest.mark.parametrize(
    ("weighted", "share", "value"),
    [
        ([], 0.5, None),
        ([(3.0, 0)], 0.5, None),
        ([(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)], 0.5, 2.0),
        ([(1.0, 1), (2.0, 99)], 0.01, 1.0),
        ([(1.0, 1), (2.0, 99)], 0.02, 2.0),
        ([(5.0, 1)], 0.0, 5.0),
        ([(5.0, 1), (6.0, 1)], 1.0, 6.0),
    ],
)
def test_percentiles(weighted: list[tuple[float, int]], share: float, value: float | None) -> None:
    assert percentile(weighted, share) == value


def test_means_of_nothing() -> None:
    assert (mean([]), deviation([]), deviation([1.0]), deviation([1.0, 3.0])) == (
        None, None, None, pytest.approx(1.41421356),
    )  # fmt: skip
