"""How a case is measured: warm-up, pacing, when it stops, what is kept and what is marked."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from fake_device import BUSY, GEMM, LOST, counts, fake, run, traced_counts

from opkit.collect.measurement import Measurement, Timing, measurement_from_json
from opkit.collect.timing.device import CpuDevice
from opkit.collect.timing.measure import (
    FIRST_LEAD,
    LONGEST_LEAD,
    LONGEST_REST,
    MOST_WARMUPS,
    host_bound,
    measure,
)
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode
from opkit.sensors.state import GpuState

GRAPH = LaunchMode.GRAPH
DOCUMENT = (Path(__file__).parents[2] / "docs" / "timing.md").read_text("utf-8")


def test_warm_up_goes_on_until_an_iteration_is_no_longer_faster() -> None:
    device = fake([19.0, 17.0, 14.0, 12.0, 10.0, 9.9])
    measured = run(device, Timing(), launch=GRAPH)
    assert measured.warmups == 6
    assert counts(device)[:7] == [1, 1, 1, 1, 1, 1, 8]
    assert measured.elapsed_ms == (9.9,) * 8


def test_warm_up_has_at_least_the_iterations_asked_for() -> None:
    assert run(fake([1.0]), Timing(warmups=5)).warmups == 5
    assert run(fake([1.0]), Timing(warmups=0)).warmups == 1


def test_warm_up_that_never_settles_ends() -> None:
    falling = (19 * 0.9**number for number in itertools.count())
    assert run(fake(falling), Timing(max_seconds=1e6)).warmups == MOST_WARMUPS
    assert run(fake([19.0, 15.0, 12.0, 1.0]), Timing(max_seconds=0.04)).warmups == 3


@pytest.mark.parametrize("launch", LaunchMode)
@pytest.mark.parametrize(("ms", "warmups", "least"), [(19.9, 3, 8), (20.0, 1, 5), (400.0, 1, 5)])
def test_a_long_case_is_warmed_up_once_and_measured_five_times(
    launch: LaunchMode, ms: float, warmups: int, least: int
) -> None:
    measured = run(fake([ms]), Timing(), launch=launch)
    assert measured.warmups == warmups
    assert len(measured.elapsed_ms) == (least if launch is GRAPH else 5)
    assert (measured.stopped, measured.before) == ("spread", BUSY)


def test_a_long_case_has_no_more_iterations_than_asked_for() -> None:
    measured = run(fake([400.0]), Timing(min_iterations=3, max_iterations=3), launch=GRAPH)
    assert (len(measured.elapsed_ms), measured.stopped) == (3, "iterations")


def test_the_second_iteration_may_show_that_a_case_is_long() -> None:
    assert run(fake([19.0, 25.0]), Timing()).warmups == 2


def test_a_first_iteration_that_compiles_is_not_taken_for_a_long_one() -> None:
    device = fake([500.0, 0.5])
    compiling = iter([0.48])

    def forward() -> None:
        device.now += next(compiling, 0.0)

    measured = measure(forward, Timing(), device, clock=device.clock)
    assert measured.warmups == 3
    assert {batch.pace.rest for batch in device.batches} == {0.0}
    assert len(measured.gpu_ms) == 8


@pytest.mark.parametrize(
    ("ms", "rest"),
    [(0.25, 0.0), (0.99, 0.0), (1.0, 0.003), (5.0, 0.015), (20.0, LONGEST_REST)],
)
def test_a_burst_rests_in_proportion_to_its_work(ms: float, rest: float) -> None:
    device = fake([ms])
    run(device, Timing(pacing="burst"), launch=GRAPH)
    measured = [batch for batch in device.batches if batch.count > 1]
    assert [batch.pace.rest for batch in measured] == [pytest.approx(rest)] * len(measured)
    ((_, pace, before),) = device.traces
    assert (pace.rest, before) == (pytest.approx(rest), 1)


def test_sustained_never_rests_and_settles_first() -> None:
    falling = [10.0] * 3 + [10.0] * 5 + [11.0] * 5 + [11.9] * 5 + [12.0]
    device = fake(falling)
    measured = run(device, Timing(pacing="sustained"), launch=GRAPH)
    assert {batch.pace.rest for batch in device.batches} == {0.0}
    # 50 ms at 10 ms are batches of 5; the fourth differs from the third by less than 1 %.
    assert counts(device) == [1, 1, 1, 5, 5, 5, 5, 8]
    assert measured.warmups == 3 + 20
    assert measured.elapsed_ms == (12.0,) * 8
    assert measured.notes == ()
    assert device.traces[0][2] == 5  # the traced pass warms up again


def test_sustained_waits_for_the_clock_too() -> None:
    clocks = [replace(BUSY, sm_mhz=mhz) for mhz in (1980, 1980, 1980, 1700, 1500, 1495, 1495)]
    device = fake([10.0], *clocks)
    measured = run(device, Timing(pacing="sustained"), launch=GRAPH)
    assert counts(device) == [1, 1, 1, 5, 5, 5, 5, 8]
    assert (measured.before.sm_mhz, measured.after.sm_mhz) == (1495, 1495)
    assert not measured.throttled


def test_sustained_that_does_not_settle_is_measured_and_says_so() -> None:
    rising = (10.0 * 1.005**number for number in itertools.count())
    timing = Timing(pacing="sustained", max_seconds=2.0)
    measured = run(fake(rising), timing, launch=GRAPH)
    assert measured.notes == ("clock and time had not settled after 2 s",)
    assert len(measured.elapsed_ms) >= 5


def test_it_stops_when_the_median_is_known() -> None:
    measured = run(fake([2.0]), Timing(min_iterations=9), launch=GRAPH)
    assert (len(measured.elapsed_ms), measured.stopped) == (9, "spread")


def test_more_spread_takes_more_iterations_up_to_the_bound() -> None:
    narrow = itertools.cycle([1.0, 1.004])
    wide = itertools.cycle([1.0, 1.2])
    few = run(fake(narrow), Timing(spread=0.0025, max_seconds=1e6), launch=GRAPH)
    timing = Timing(spread=0.0025, max_iterations=150, max_seconds=1e6)
    many = run(fake(wide), timing, launch=GRAPH)
    assert (len(few.elapsed_ms), few.stopped) == (8, "spread")
    assert (len(many.elapsed_ms), many.stopped) == (150, "iterations")


def test_time_ends_it_but_not_before_the_least_iterations() -> None:
    slow = run(fake(itertools.cycle([400.0, 600.0])), Timing(max_seconds=2.0), launch=GRAPH)
    assert (len(slow.elapsed_ms), slow.stopped) == (5, "time")
    device = fake(itertools.cycle([20.0, 30.0]))
    some = run(device, Timing(max_seconds=3.0), launch=GRAPH)
    assert some.stopped == "time"
    spent = sum(some.elapsed_ms) / 1e3 + len(some.elapsed_ms) * LONGEST_REST
    assert spent == pytest.approx(3.0, abs=0.2)  # no batch runs far beyond it


def test_fewer_than_five_samples_are_never_enough() -> None:
    measured = run(fake([1.0]), Timing(min_iterations=1), launch=GRAPH)
    assert (len(measured.elapsed_ms), measured.stopped) == (5, "spread")


def test_every_sample_is_kept_outliers_too() -> None:
    times = [1.0] * 3 + [1.0, 1.0, 55.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    measured = run(fake(times), Timing(), launch=GRAPH)
    assert 55.0 in measured.elapsed_ms
    assert len(measured.elapsed_ms) == 8 + 4  # with one of 8 far off, the interval is too wide


def test_cold_sweeps_before_each_iteration_and_in_the_traced_pass() -> None:
    device = fake([0.5])
    run(device, Timing(l2="cold"))
    assert len(device.batches) > 3
    assert all(batch.pace.cold for batch in device.batches)
    assert device.traces[0][1].cold
    warm = fake([0.5])
    run(warm, Timing(l2="warm"))
    assert not any(batch.pace.cold for batch in warm.batches)


def test_the_host_gets_ahead_of_graphs_but_not_of_eager_launches() -> None:
    graph, eager = fake([0.1], host_ms=0.02), fake([0.1], host_ms=0.02)
    run(graph, Timing(), launch=LaunchMode.GRAPH)
    run(eager, Timing(), launch=LaunchMode.EAGER)
    assert graph.batches[-1].pace.lead == pytest.approx(FIRST_LEAD + 8 * 20e-6)
    assert eager.batches[-1].pace.lead == FIRST_LEAD
    slow = fake([0.1], host_ms=50.0)
    run(slow, Timing(), launch=LaunchMode.GRAPH)
    assert slow.batches[-1].pace.lead == FIRST_LEAD + LONGEST_LEAD
    assert graph.traces[0][1].lead == 0.0  # its kernel is the trace's marker


@pytest.mark.parametrize(("launch", "least"), [(GRAPH, 3), (LaunchMode.EAGER, 5)])
def test_gpu_time_is_taken_in_few_iterations(launch: LaunchMode, least: int) -> None:
    small, large = fake([0.25]), fake([300.0])
    measured = run(small, Timing(), launch=launch)
    run(large, Timing(), launch=launch)
    assert traced_counts(small) == [8]
    assert traced_counts(large) == [least]
    assert measured.gpu_ms == (0.9,) * 8
    assert measured.kernels == (GEMM,)


def test_gpu_time_that_is_not_asked_for_is_not_taken() -> None:
    device = fake([0.25])
    measured = run(device, Timing(gpu_time=False))
    assert (measured.gpu_ms, device.traces) == ((), [])
    assert len(measured.elapsed_ms) == 8  # the elapsed time is all there is


def test_a_traced_graph_without_kernels_is_told() -> None:
    measured = run(fake([0.25], traced=[LOST]), Timing(), launch=GRAPH)
    assert measured.gpu_ms == ()
    assert measured.notes == (LOST.problem,)


@pytest.mark.parametrize(
    ("after", "throttled"),
    [
        (BUSY, False),
        (replace(BUSY, throttle=("GpuIdle",)), False),
        (replace(BUSY, throttle=("ApplicationsClocksSetting",)), False),
        (replace(BUSY, throttle=("SwPowerCap",)), False),
        (replace(BUSY, sm_mhz=1921, throttle=("SwPowerCap",)), False),  # 97 % of 1980 are 1920.6
        (replace(BUSY, sm_mhz=1920, throttle=("SwPowerCap",)), True),
        (GpuState(throttle=("SwPowerCap",)), True),
        (replace(BUSY, throttle=("SwPowerCap", "HwSlowdown")), True),
        (GpuState(throttle=("HwThermalSlowdown",)), True),
        (replace(BUSY, throttle=("GpuIdle", "HwThermalSlowdown")), True),
        (replace(BUSY, sm_mhz=1783), False),
        (replace(BUSY, sm_mhz=1781), True),
        (GpuState(), False),
    ],
)
def test_a_lowered_clock_marks_the_row(after: GpuState, throttled: bool) -> None:
    measured = run(fake([1.0], BUSY, BUSY, after), Timing())
    assert measured.throttled is throttled
    assert measured.before == BUSY
    assert measured.after == after  # with its reasons


def test_a_power_limit_counts_where_the_highest_clock_is_unknown() -> None:
    device = fake([1.0], replace(BUSY, throttle=("SwPowerCap",)))
    assert not run(device, Timing()).throttled
    device.sensors.highest_mhz = None
    assert run(device, Timing()).throttled


def test_throttling_in_an_earlier_batch_is_not_forgotten() -> None:
    hot = replace(BUSY, throttle=("SwThermalSlowdown",))
    times = [1.0] * 3 + [1.0] * 7 + [2.0] + [1.0]
    measured = run(fake(times, BUSY, BUSY, hot, BUSY), Timing(), launch=GRAPH)
    assert len(measured.elapsed_ms) > 8
    assert measured.throttled
    assert measured.after == hot


@pytest.mark.parametrize("launch", LaunchMode)
def test_the_state_is_asked_in_the_first_and_last_warm_up_and_once_a_batch(
    launch: LaunchMode,
) -> None:
    device = fake([1.0])
    run(device, Timing(), launch=launch)
    assert [batch.observed for batch in device.batches] == [True, False, True, True]


def test_launch_and_graph_error_are_written_down() -> None:
    measured = run(fake([1.0]), Timing(), launch=LaunchMode.EAGER, graph_error="cannot capture")
    assert (measured.launch, measured.graph_error) == (LaunchMode.EAGER, "cannot capture")


def test_host_bound_is_much_less_gpu_time_than_elapsed() -> None:
    eager = Measurement(elapsed_ms=(1.8, 1.9, 2.0), gpu_ms=(0.3,))
    assert host_bound(eager) is True
    assert host_bound(replace(eager, gpu_ms=(1.8,))) is False
    assert host_bound(replace(eager, launch=LaunchMode.GRAPH)) is False
    assert host_bound(replace(eager, gpu_ms=())) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"pacing": "bursts"},
        {"l2": "hot"},
        {"min_iterations": 0},
        {"min_iterations": 9, "max_iterations": 8},
        {"warmups": -1},
        {"spread": -0.1},
    ],
)
def test_a_timing_that_cannot_be_followed_is_refused(wrong: dict[str, object]) -> None:
    device = fake([1.0])
    with pytest.raises(BadInput, match=next(iter(wrong))):
        run(device, replace(Timing(), **wrong))  # type: ignore[arg-type]
    assert device.batches == []


def test_a_failing_forward_fails_the_case() -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure(fail, Timing(), CpuDevice())


def test_on_a_cpu_everything_but_gpu_numbers_is_there_and_survives_json() -> None:
    calls = 0

    def forward() -> None:
        nonlocal calls
        calls += 1
        sum(range(20_000))

    timing = Timing(max_iterations=20, power=True, power_seconds=0.01)
    measured = measure(forward, timing, CpuDevice())
    assert 8 <= len(measured.elapsed_ms) <= 20
    assert min(measured.elapsed_ms) > 0
    assert calls == measured.warmups + len(measured.elapsed_ms)
    assert (measured.gpu_ms, measured.kernels, measured.power) == ((), (), None)
    assert measured.notes == ("no power: the GPU gives neither energy nor power",)
    assert (measured.before, measured.throttled) == (GpuState(), False)
    assert measurement_from_json(measured.to_json(), "row") == measured


@pytest.mark.parametrize("key", [item.name for item in fields(Timing)])
def test_every_default_is_documented(key: str) -> None:
    row = re.search(rf"^\| `{key}` \| (\S+) \|", DOCUMENT, flags=re.MULTILINE)
    assert row is not None
    assert row[1] == str(getattr(Timing(), key)).lower()
