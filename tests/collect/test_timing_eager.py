"""Eager cases: GPU time says when to stop and how long to rest; elapsed time is taken briefly."""

from __future__ import annotations

import itertools

import pytest
from fake_device import GEMM, LOST, counts, fake, run, traced_counts

from opkit.collect.measurement import Timing
from opkit.collect.timing.device import Pace
from opkit.collect.timing.kernel_times import Trace


@pytest.mark.parametrize(("gpu_ms", "rest"), [(0.23, 0.0), (0.99, 0.0), (1.5, 0.0045)])
def test_an_eager_burst_rests_by_what_the_gpu_works(gpu_ms: float, rest: float) -> None:
    device = fake([4.9], gpu=[gpu_ms])
    run(device, Timing(l2="cold"))
    probe, taken = device.traces
    assert probe == (3, Pace(cold=True), 1)
    assert taken[1].rest == device.batches[-1].pace.rest == pytest.approx(rest)


@pytest.mark.parametrize("ms", [0.99, 5.0])
def test_an_eager_case_that_needs_no_rest_or_surely_one_is_not_probed(ms: float) -> None:
    device = fake([ms])
    run(device, Timing())
    assert traced_counts(device) == [8]
    assert device.traces[0][1].rest == pytest.approx(0.003 * ms if ms >= 1 else 0.0)


def test_a_probe_that_sees_nothing_leaves_the_rest_to_the_elapsed_time() -> None:
    device = fake([2.0], traced=[LOST])
    measured = run(device, Timing())
    assert traced_counts(device) == [3, 8]
    assert device.batches[-1].pace.rest == pytest.approx(0.006)
    assert measured.notes == ()


def test_sustained_is_not_probed_and_settles_again_after_the_traced_passes() -> None:
    device = fake([4.0], gpu=[0.5])
    measured = run(device, Timing(pacing="sustained"))
    assert [(count, before) for count, _, before in device.traces] == [(8, 13)]
    assert counts(device) == [1, 1, 1, 13, 13, 13, 5]
    assert [batch.observed for batch in device.batches[-2:]] == [False, True]
    assert len(measured.elapsed_ms) == 5


def test_an_eager_case_stops_by_its_gpu_time_however_its_elapsed_time_jitters() -> None:
    device = fake(itertools.cycle([0.3, 0.9, 0.5]), gpu=itertools.cycle([0.23, 0.2304]))
    measured = run(device, Timing())
    assert (len(measured.gpu_ms), measured.stopped) == (8, "spread")
    assert (traced_counts(device), counts(device)[-2:]) == ([8], [1, 5])
    assert len(measured.elapsed_ms) == 5


def test_an_eager_case_is_traced_on_until_its_median_is_known() -> None:
    gpu = [1.0, 1.2] * 4 + [1.1] * 100
    device = fake([0.9], gpu=gpu)
    measured = run(device, Timing())
    assert measured.stopped == "spread"
    assert traced_counts(device) == [8, 8, 8]
    assert measured.gpu_ms == tuple(gpu[:24])  # of all passes, none dropped
    assert measured.kernels == (GEMM,)


def test_an_eager_case_is_traced_up_to_the_bound_on_iterations() -> None:
    device = fake([0.9], gpu=itertools.cycle([1.0, 1.2]))
    measured = run(device, Timing(max_iterations=50))
    assert measured.stopped == "iterations"
    assert traced_counts(device) == [8, 8, 8, 12, 14]
    assert len(measured.elapsed_ms) == 5


def test_time_ends_the_traced_passes_but_not_before_five_iterations() -> None:
    device = fake([100.0], gpu=itertools.cycle([90.0, 110.0]))
    measured = run(device, Timing(max_seconds=2.0))
    assert measured.stopped == "time"
    # With rests and one iteration before, passes take 0.96, 0.96 and 0.32 s.
    assert traced_counts(device) == [5, 5, 1]
    slow = fake([400.0], gpu=itertools.cycle([390.0, 410.0]))
    assert run(slow, Timing(max_seconds=2.0)).stopped == "time"
    assert traced_counts(slow) == [5]


def test_an_eager_case_has_no_more_timed_iterations_than_asked_for() -> None:
    measured = run(fake([0.5]), Timing(min_iterations=2, max_iterations=2))
    assert (len(measured.elapsed_ms), len(measured.gpu_ms)) == (2, 5)


def test_a_later_pass_that_loses_its_markers_costs_no_sample() -> None:
    device = fake([0.5], traced=[Trace((1.0, 1.2) * 4, (GEMM,)), LOST])
    measured = run(device, Timing())
    assert measured.gpu_ms == (1.0, 1.2) * 4
    assert (measured.stopped, measured.notes) == ("trace", (LOST.problem,))


def test_when_elapsed_time_is_the_value_it_decides_for_eager_launches_too() -> None:
    device = fake(itertools.cycle([0.5, 0.6]), gpu=[0.4])
    measured = run(device, Timing(max_iterations=20), by_elapsed=True)
    assert (len(measured.elapsed_ms), measured.stopped) == (20, "iterations")
    assert len(measured.gpu_ms) > 0


def test_the_hosts_jitter_does_not_make_a_short_eager_case_rest() -> None:
    """The last warm-up took 30 ms, the GPU 0.2 ms of it: seen on an H100."""
    device = fake([2.0, 2.0, 30.0, 2.0], gpu=[0.2])
    run(device, Timing())
    assert {batch.pace.rest for batch in device.batches} == {0.0}


def test_without_gpu_time_an_eager_case_goes_by_its_elapsed_time() -> None:
    device = fake(itertools.cycle([0.5, 0.6]), traced=[LOST])
    measured = run(device, Timing(max_iterations=20))
    assert len(device.traces) == 1
    assert (measured.gpu_ms, measured.kernels) == ((), ())
    assert (len(measured.elapsed_ms), measured.stopped) == (20, "iterations")
    assert measured.notes == (LOST.problem,)


def test_what_was_odd_in_the_first_traced_pass_is_not_forgotten() -> None:
    odd = "iterations launched 2 to 3 kernels, not always as many"
    device = fake([0.5], gpu=[1.1], traced=[Trace((1.0, 1.2) * 4, (GEMM,), odd)])
    measured = run(device, Timing())
    assert len(measured.gpu_ms) > 8
    assert measured.notes == (odd,)
