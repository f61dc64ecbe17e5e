"""A Jetson's sensors, on a made-up sysfs with the layout of JetPack 5 and 6."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_sysfs import AGX_ORIN, ORIN_NX, make_jetson, put

from opkit.errors import BadInput
from opkit.sensors.jetson import JetsonSensors


def test_everything_has_its_unit(tmp_path: Path) -> None:
    levels = JetsonSensors(make_jetson(tmp_path, ORIN_NX)).levels()
    assert levels.power == pytest.approx(
        {"VDD_IN": 10.112, "VDD_CPU_GPU_CV": 4.0384, "VDD_SOC": 1.5144}
    )
    assert levels.temp == {"cpu-thermal": 48.5, "gpu-thermal": 46.25}
    assert levels.freq == {"GPU": 918.0, "CPU policy0": 1984.0}


def test_a_module_s_input_is_its_power(tmp_path: Path) -> None:
    sensors = JetsonSensors(make_jetson(tmp_path, ORIN_NX))
    meter = sensors.meter()
    assert meter is not None
    assert (meter.method, meter.counts, sensors.scope) == (
        "sampling of INA3221 rails", False, "rail VDD_IN",
    )  # fmt: skip
    assert meter.read() == pytest.approx(10.112)


def test_agx_orin_has_no_input_rail_and_none_is_counted_twice(tmp_path: Path) -> None:
    sensors = JetsonSensors(make_jetson(tmp_path, AGX_ORIN))
    meter = sensors.meter()
    assert meter is not None
    assert meter.read() == pytest.approx(19.8 + 3.96 + 7.5)
    assert sensors.scope == "rail VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    # All connected rails are recorded, those that are no part of the sum too.
    assert set(sensors.levels().power) == {
        "VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO",
    }  # fmt: skip


def test_rails_can_be_chosen(tmp_path: Path) -> None:
    make_jetson(tmp_path, AGX_ORIN)
    sensors = JetsonSensors(tmp_path, ("VDD_GPU_SOC",))
    meter = sensors.meter()
    assert meter is not None
    assert meter.read() == pytest.approx(19.8)
    with pytest.raises(BadInput, match="no rail 'VDD_GPU'; there are VDD_GPU_SOC, "):
        JetsonSensors(tmp_path, ("VDD_GPU",))


@pytest.mark.parametrize(
    ("driver", "gpu"),
    [("ina3221", "17000000.gpu"), ("ina3221", "17000000.ga10b"), ("ina3221x", "17000000.gv11b")],
)
def test_names_that_differ_between_boards(tmp_path: Path, driver: str, gpu: str) -> None:
    levels = JetsonSensors(make_jetson(tmp_path, ORIN_NX, driver=driver, gpu=gpu)).levels()
    assert levels.power["VDD_IN"] == pytest.approx(10.112)
    assert levels.freq["GPU"] == 918.0


def test_what_is_the_gpu_s(tmp_path: Path) -> None:
    sensors = JetsonSensors(make_jetson(tmp_path, ORIN_NX))
    assert (sensors.heat, sensors.clock) == (("gpu-thermal",), ("GPU",))


def test_memory_clock_for_root(tmp_path: Path) -> None:
    make_jetson(tmp_path, ORIN_NX)
    put(tmp_path / "sys/kernel/debug/bpmp/debug/clk/emc/rate", 3_199_000_000)
    assert JetsonSensors(tmp_path).levels().freq["EMC"] == 3199.0


def test_facts(tmp_path: Path) -> None:
    assert JetsonSensors(make_jetson(tmp_path, ORIN_NX)).facts() == {
        "board": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "rails": ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"],
        "zones": ["cpu-thermal", "gpu-thermal"],
    }


def test_a_sensor_that_stops_answering_is_left_out(tmp_path: Path) -> None:
    """A zone that is off answers EAGAIN; here, its file is gone or holds nothing."""
    sensors = JetsonSensors(make_jetson(tmp_path, AGX_ORIN))
    (tmp_path / "sys/class/thermal/thermal_zone1/temp").unlink()
    rail = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr2_input"
    (tmp_path / rail).write_text("\n")
    levels = sensors.levels()
    assert levels.temp == {"cpu-thermal": 48.5}
    assert "VDD_CPU_CV" not in levels.power
    meter = sensors.meter()
    assert meter is not None
    assert meter.read() is None  # a sum without one of its parts would be too small


def test_another_machine_is_no_jetson(tmp_path: Path) -> None:
    sensors = JetsonSensors(tmp_path)
    assert not sensors
    assert (sensors.meter(), sensors.scope) == (None, "")
    assert sensors.levels().power == {}
