"""Which sensors a machine has: NVML where it tells power, else a Jetson's, else none."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvml import FakeNvml, NVMLError_NotSupported
from made_sysfs import ORIN_NX, SeveralGpus, make_jetson

from opkit.errors import ToolMissing
from opkit.sensors.detect import detect
from opkit.sensors.levels import Levels, NoSensors, Sensors
from opkit.sensors.nvml_gpus import open_gpus

NO_POWER = {
    "nvmlDeviceGetTotalEnergyConsumption": NVMLError_NotSupported("no"),
    "nvmlDeviceGetPowerUsage": NVMLError_NotSupported("no"),
    "instant": None,
}


def found(kind: str, root: Path, nvml: SeveralGpus | None) -> Sensors:
    return detect(kind, root=root, nvml=lambda gpus, count: nvml and open_gpus(gpus, count, nvml))


@pytest.fixture
def pc(tmp_path: Path) -> Path:
    return tmp_path / "pc"


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    return make_jetson(tmp_path / "jetson", ORIN_NX)


def test_a_gpu_host(pc: Path) -> None:
    assert found("auto", pc, SeveralGpus("H100")).kind == "nvml"


def test_a_jetson_without_nvml(jetson: Path) -> None:
    assert found("auto", jetson, None).kind == "jetson"


def test_a_jetson_whose_nvml_knows_no_power(jetson: Path) -> None:
    orin = SeveralGpus("Orin", gpus={0: FakeNvml(**NO_POWER)})
    assert found("auto", jetson, orin).kind == "jetson"


def test_a_gpu_without_power_is_better_than_nothing(pc: Path) -> None:
    assert found("auto", pc, SeveralGpus("Orin", gpus={0: FakeNvml(**NO_POWER)})).kind == "nvml"


def test_neither(pc: Path) -> None:
    sensors = found("auto", pc, None)
    assert (sensors.kind, sensors.scope, sensors.meter()) == ("none", "", None)
    assert (sensors.levels(), sensors.facts()) == (Levels(), {})


def test_a_kind_can_be_forced(jetson: Path) -> None:
    assert found("jetson", jetson, SeveralGpus("H100")).kind == "jetson"
    assert found("nvml", jetson, SeveralGpus("H100")).kind == "nvml"
    assert found("none", jetson, SeveralGpus("H100")) == NoSensors()


@pytest.mark.parametrize(("kind", "sentence"), [("nvml", "lists no GPU"), ("jetson", "INA3221")])
def test_a_kind_that_is_not_there(pc: Path, kind: str, sentence: str) -> None:
    with pytest.raises(ToolMissing, match=sentence):
        found(kind, pc, None)
