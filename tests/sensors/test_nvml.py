"""What NVML tells, and that what it does not tell disturbs nothing."""

from __future__ import annotations

import logging
import sys

import pynvml
import pytest
from fake_nvml import ASKED_WITH, UUID, FakeNvml, NVMLError_NotSupported, NVMLError_Unknown

from opkit.sensors.nvml import REASONS, THROTTLES, Gpu, open_gpu
from opkit.sensors.state import GpuState


def test_a_state_has_everything_in_its_unit() -> None:
    gpu = open_gpu(UUID, FakeNvml(nvmlDeviceGetCurrentClocksEventReasons=0x4 | 0x20))
    assert gpu.state() == GpuState(1980, 2619, 41, 412.5, ("SwPowerCap", "SwThermalSlowdown"))
    assert gpu.power_limit_watts() == 700.0
    assert gpu.energy_joules() == 5000.0


def test_the_highest_clock_is_not_the_present_one() -> None:
    assert open_gpu(UUID, FakeNvml(sm=1410)).highest_sm_mhz() == 1980
    silent = FakeNvml(**{"highest sm": NVMLError_NotSupported("no")})
    assert open_gpu(UUID, silent).highest_sm_mhz() is None


@pytest.mark.parametrize("name", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_a_gpu_that_nvml_does_not_know_gives_an_empty_state(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = open_gpu(UUID, FakeNvml(**{name: NVMLError_Unknown("driver not loaded")}))
    assert gpu.state() == GpuState()
    assert (gpu.power_watts(), gpu.energy_joules(), gpu.power_limit_watts()) == (None, None, None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "driver not loaded" in caplog.text


def test_a_wrong_uuid_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert open_gpu("GPU-other", FakeNvml()).state() == GpuState()
    assert "GPU-other" in caplog.text


def test_without_pynvml_there_is_no_exception(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpu(UUID).state() == GpuState()
    assert "pynvml is missing" in caplog.text


def test_what_is_not_supported_is_none_asked_once_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    nvml = FakeNvml(nvmlDeviceGetTotalEnergyConsumption=NVMLError_NotSupported("not supported"))
    gpu = open_gpu(UUID, nvml)
    assert [gpu.energy_joules() for _ in range(3)] == [None] * 3
    assert nvml.calls.count("nvmlDeviceGetTotalEnergyConsumption") == 1
    assert caplog.text.count("gives nothing") == 1


def test_a_passing_failure_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gpu = open_gpu(UUID, FakeNvml(sm=[NVMLError_Unknown("busy"), NVMLError_Unknown("busy"), 1410]))
    assert [gpu.state().sm_mhz for _ in range(3)] == [None, None, 1410]
    assert caplog.text.count("gives nothing") == 1


def test_drivers_before_535_are_asked_by_the_old_names() -> None:
    nvml = FakeNvml(
        nvmlDeviceGetCurrentClocksEventReasons=NVMLError_NotSupported("no"),
        nvmlDeviceGetCurrentClocksThrottleReasons=0x8,
        nvmlDeviceGetTemperatureV=NVMLError_NotSupported("no"),
        nvmlDeviceGetTemperature=55,
    )
    state = open_gpu(UUID, nvml).state()
    assert state.throttle == ("HwSlowdown",)
    assert state.temperature_c == 55


@pytest.mark.parametrize("instant", [None, NVMLError_NotSupported("no fields")])
def test_power_without_the_instant_field_is_the_average_and_says_so(
    instant: Exception | None,
) -> None:
    nvml = FakeNvml(instant=instant)
    gpu = open_gpu(UUID, nvml)
    assert gpu.instant
    assert (gpu.power_watts(), gpu.instant) == (400.0, False)
    assert gpu.power_watts() == 400.0
    assert nvml.calls.count("nvmlDeviceGetFieldValues") == 1


def test_a_gpu_without_nvml_knows_nothing() -> None:
    assert Gpu().state() == GpuState()
    assert Gpu().power_watts() is None
    assert Gpu().highest_sm_mhz() is None


def test_the_bits_are_those_of_nvml() -> None:
    prefixes = ("nvmlClocksEventReason", "nvmlClocksThrottleReason")
    for bit, name in REASONS.items():
        known = [getattr(pynvml, prefix + name, None) for prefix in prefixes]
        assert bit in known, name
    assert set(REASONS.values()) > THROTTLES
    assert not THROTTLES & {"GpuIdle", "ApplicationsClocksSetting", "SyncBoost"}


def test_the_fake_has_only_names_that_pynvml_has() -> None:
    fake = FakeNvml(nvmlDeviceGetCurrentClocksThrottleReasons=0, nvmlDeviceGetTemperature=0)
    names = [name for name in fake.answers if name.startswith("nvml")]
    names += [*ASKED_WITH, "NVMLError"]
    assert [name for name in names if not hasattr(pynvml, name)] == []
    for constant in ("CLOCK_SM", "CLOCK_MEM", "TEMPERATURE_GPU", "FI_DEV_POWER_INSTANT"):
        assert getattr(fake, f"NVML_{constant}") == getattr(pynvml, f"NVML_{constant}")
    assert pynvml.NVML_SUCCESS == 0
