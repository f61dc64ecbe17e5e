"""Which GPUs are read, and what they are together."""

from __future__ import annotations

import pytest
from fake_nvml import FakeNvml, NVMLError_NotSupported, NVMLError_Unknown
from made_sysfs import SeveralGpus

from opkit.errors import BadInput
from opkit.sensors.meter import LEAD, LEAD_AVERAGED
from opkit.sensors.nvml_gpus import NvmlSensors, open_gpus

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def opened(nvml: object, wanted: str = "", count: int = 1) -> NvmlSensors:
    found = open_gpus(wanted, count, nvml)
    assert found is not None
    return found


def indices(sensors: NvmlSensors) -> list[int]:
    return [gpu["index"] for gpu in sensors.facts()["gpus"]]


def test_one_gpu() -> None:
    sensors = opened(SeveralGpus(H100))
    levels = sensors.levels()
    assert levels.power == {"GPU 0": 412.5}
    assert levels.temp == {"GPU 0": 41}
    assert levels.freq == {"GPU 0 SM": 1980, "GPU 0 memory": 2619}
    assert (sensors.heat, sensors.clock) == (("GPU 0",), ("GPU 0 SM",))
    assert sensors.facts() == {
        "gpus": [
            {"index": 0, "uuid": "GPU-00000000", "name": H100, "power_limit_w": 700.0}
        ],
        "listed": 1,
        "driver": "580.159.04",
    }  # fmt: skip


def test_the_counters_of_several_gpus_are_summed() -> None:
    second = FakeNvml(nvmlDeviceGetTotalEnergyConsumption=1_000_000)
    sensors = opened(SeveralGpus(H100, H100, gpus={1: second}), count=2)
    meter = sensors.meter()
    assert meter is not None
    assert (meter.method, meter.counts, meter.lead) == ("energy counter", True, LEAD)
    assert meter.read() == 6000.0
    assert sensors.scope == "whole board of GPU 0, GPU 1"


def test_a_gpu_without_a_counter_makes_all_be_sampled() -> None:
    without = FakeNvml(nvmlDeviceGetTotalEnergyConsumption=NVMLError_NotSupported("no"))
    meter = opened(SeveralGpus(H100, "V", gpus={1: without}), count=2).meter()
    assert meter is not None
    assert (meter.method, meter.counts) == ("sampling of instantaneous power", False)
    assert meter.read() == 825.0


def test_a_gpu_with_averaged_power_only() -> None:
    old = FakeNvml(nvmlDeviceGetTotalEnergyConsumption=NVMLError_NotSupported("no"), instant=None)
    meter = opened(SeveralGpus("P100", gpus={0: old})).meter()
    assert meter is not None
    assert (meter.method, meter.lead) == ("sampling of the 1 s average", LEAD_AVERAGED)


def test_a_gpu_without_power_has_clocks_still() -> None:
    silent = FakeNvml(
        nvmlDeviceGetTotalEnergyConsumption=NVMLError_NotSupported("no"),
        nvmlDeviceGetPowerUsage=NVMLError_NotSupported("no"),
        instant=None,
    )
    sensors = opened(SeveralGpus("Orin", gpus={0: silent}))
    assert (sensors.meter(), sensors.scope, sensors.levels().power) == (None, "", {})
    assert sensors.levels().freq["GPU 0 SM"] == 1980


def test_only_reasons_that_cost_time_are_throttling() -> None:
    idle_and_hot = FakeNvml(nvmlDeviceGetCurrentClocksEventReasons=0x01 | 0x20)
    levels = opened(SeveralGpus(H100, gpus={0: idle_and_hot})).levels()
    assert levels.throttle == ("SwThermalSlowdown",)


@pytest.mark.parametrize(
    ("visible", "wanted", "count", "read"),
    [
        ("", "", 1, [0]),
        ("", "", 2, [0, 1]),
        ("", "2,0", 1, [2, 0]),
        ("", "GPU-00000001", 1, [1]),
        ("1,2", "", 1, [1]),
        ("2,1", "", 2, [2, 1]),
        ("GPU-00000002", "", 1, [2]),
        ("1", "0", 1, [0]),
        ("7,1", "", 2, [1]),
    ],
)
def test_which_gpus_are_read(
    monkeypatch: pytest.MonkeyPatch, visible: str, wanted: str, count: int, read: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert indices(opened(SeveralGpus(H100, H100, H100), wanted, count)) == read


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(BadInput, match="--gpus: no GPU '3'; NVML lists 0, 1"):
        open_gpus("3", 1, SeveralGpus(H100, H100))


def test_no_gpu_and_no_nvml() -> None:
    assert open_gpus("", 1, SeveralGpus()) is None
    assert open_gpus("", 1, FakeNvml(nvmlInit=NVMLError_Unknown("no driver"))) is None
