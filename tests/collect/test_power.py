"""Power from a counter that moves in steps, and from samples."""

from __future__ import annotations

import threading
import time

import pytest
from fake_device import FakeDevice
from fake_nvml import UUID, FakeNvml, NVMLError_NotSupported

from opkit.collect.measurement import Timing
from opkit.collect.timing.device import CpuDevice, Run
from opkit.collect.timing.measure import measure
from opkit.collect.timing.power import measure_power
from opkit.sensors.meter import (
    LEAD,
    LEAD_AVERAGED,
    Meter,
    Reading,
    Sampler,
    choose_meter,
    mean_level,
    mean_rate,
)
from opkit.sensors.nvml import Gpu, open_gpu

NO_ENERGY = {"nvmlDeviceGetTotalEnergyConsumption": NVMLError_NotSupported("no")}


def nothing() -> None:
    """An iteration."""


def test_the_counter_is_read_from_step_to_step() -> None:
    # 500 W, a step every 50 ms, read every 10 ms; the first and last part-steps do not count.
    readings: list[Reading] = [
        (tick / 100, 7.0 + 25.0 * ((tick + 3) // 5)) for tick in range(0, 100)
    ]
    assert mean_rate(readings) == pytest.approx(500.0)
    first_to_last = (readings[-1][1] - readings[0][1]) / (readings[-1][0] - readings[0][0])
    assert abs(first_to_last - 500.0) > 1.0  # what reading the two ends alone would give


@pytest.mark.parametrize(
    "readings", [[], [(0.0, 5.0)], [(0.0, 5.0), (1.0, 5.0)], [(0.0, 5.0), (1.0, 6.0), (2.0, 6.0)]]
)
def test_a_counter_with_fewer_than_two_steps_gives_nothing(readings: list[Reading]) -> None:
    assert mean_rate(readings) is None


def test_samples_are_weighted_with_their_time() -> None:
    assert mean_level([(0.0, 100.0), (1.0, 300.0), (4.0, 300.0)]) == pytest.approx(275.0)
    assert mean_level([(0.0, 100.0)]) is None
    assert mean_level([(1.0, 100.0), (1.0, 100.0)]) is None


@pytest.mark.parametrize(
    ("answers", "method", "counts", "lead"),
    [
        ({}, "energy counter", True, LEAD),
        (NO_ENERGY, "sampling of instantaneous power", False, LEAD),
        ({**NO_ENERGY, "instant": None}, "sampling of the 1 s average", False, LEAD_AVERAGED),
    ],
)
def test_the_best_meter_is_chosen(
    answers: dict[str, object], method: str, counts: bool, lead: float
) -> None:
    meter = choose_meter(open_gpu(UUID, FakeNvml(**answers)))
    assert meter is not None
    assert (meter.method, meter.counts, meter.lead) == (method, counts, lead)


class Powered(CpuDevice):
    """A CPU with the sensors of a GPU, whose runs take what a test says."""

    def __init__(self, sensors: Gpu, *runs: Run) -> None:
        super().__init__()
        self.sensors = sensors
        self.runs = list(runs)
        self.asked: list[tuple[float, int]] = []

    def run(self, forward: object, seconds: float, chunk: int) -> Run:  # noqa: ARG002
        self.asked.append((seconds, chunk))
        self.sampled = threading.active_count()
        time.sleep(0.05)
        return self.runs.pop(0)


def test_energy_per_iteration_and_own_overhead() -> None:
    counter = [5_000_000 + 10_000 * step for step in range(100)]
    sensors = open_gpu(UUID, FakeNvml(nvmlDeviceGetTotalEnergyConsumption=counter))
    device = Powered(sensors, Run(9, 0.3), Run(1000, 1.0), Run(980, 1.0))
    power, problem = measure_power(nothing, device, 1.0, 0.001)
    assert problem == ""
    assert power is not None
    assert device.asked == [(LEAD, 20), (1.0, 20), (1.0, 20)]  # 20 ms of work at a time
    assert (power.method, power.samples, power.seconds) == ("energy counter", 0, 1.0)
    assert power.watts > 0
    assert power.joules_per_iteration == pytest.approx(power.watts / 980)
    assert power.limit_watts == 700.0
    assert power.overhead == pytest.approx(1000 / 980 - 1)


def test_sampling_gives_the_mean_and_counts_its_samples() -> None:
    sensors = open_gpu(UUID, FakeNvml(**NO_ENERGY, instant=350_000))
    device = Powered(sensors, Run(9, 0.3), Run(100, 1.0), Run(100, 1.0))
    power, _ = measure_power(nothing, device, 1.0, 0.010)
    assert power is not None
    assert (power.watts, power.method) == (350.0, "sampling of instantaneous power")
    assert power.samples >= 3  # in 50 ms, one every 10 ms
    assert power.joules_per_iteration == pytest.approx(3.5)


def test_a_counter_that_does_not_move_is_told() -> None:
    device = Powered(open_gpu(UUID, FakeNvml()), Run(9, 0.3), Run(9, 0.3), Run(9, 0.3))
    power, problem = measure_power(nothing, device, 0.3, 0.03)
    assert power is None
    assert "by energy counter in 0.30 s are too few, or the counter did not move" in problem


def test_without_nvml_nothing_runs_and_that_is_told() -> None:
    device = FakeDevice(iter([1.0]))
    device.sensors = Gpu()  # type: ignore[assignment]
    assert measure_power(nothing, device, 1.0, 0.001) == (
        None,
        "no power: the GPU gives neither energy nor power",
    )
    assert device.runs == []


def test_the_thread_of_the_sampler_ends_with_it() -> None:
    before = threading.active_count()
    values = iter([1.0, None, 3.0])
    with Sampler(lambda: next(values, 4.0), interval=0.001) as sampler:
        time.sleep(0.02)
    assert threading.active_count() == before
    assert [value for _, value in sampler.readings[:2]] == [1.0, 3.0]  # None is no reading
    moments = [moment for moment, _ in sampler.readings]
    assert moments == sorted(moments)


def test_the_sampler_ends_when_the_run_fails() -> None:
    before = threading.active_count()

    def fail() -> None:
        raise RuntimeError("CUDA error")

    meter = Meter("sampling", lambda: 1.0, False, 0.0)
    with pytest.raises(RuntimeError, match="CUDA error"):
        measure_power(fail, CpuDevice(), 0.1, 0.001, meter)
    assert threading.active_count() == before


def test_power_is_part_of_a_measurement_when_asked_for() -> None:
    sensors = open_gpu(UUID, FakeNvml(**NO_ENERGY))
    device = Powered(sensors, Run(9, 0.3), Run(100, 1.0), Run(100, 1.0))
    measured = measure(nothing, Timing(power=True, max_iterations=8), device)
    assert measured.power is not None
    assert measured.power.watts == 412.5
    assert measured.before.power_w == 412.5
