"""A made-up sysfs with the layout of real Jetson boards, and a made-up NVML with several GPUs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fake_nvml import FakeNvml

# Jetson Orin NX, JetPack 6: one monitor, hwmon number as the kernel gave it.
ORIN_NX = {
    "1-0040": {1: ("VDD_IN", 5056, 2000), 2: ("VDD_CPU_GPU_CV", 5048, 800),
               3: ("VDD_SOC", 5048, 300)},
}  # fmt: skip
# Jetson AGX Orin: two monitors, two of whose channels are not connected.
AGX_ORIN = {
    "1-0040": {1: ("VDD_GPU_SOC", 19800, 1000), 2: ("VDD_CPU_CV", 19800, 200),
               3: ("VIN_SYS_5V0", 5000, 1500)},
    "1-0041": {1: ("NC", 0, 0), 2: ("VDDQ_VDD2_1V8AO", 5000, 300), 3: ("NC", 0, 0)},
}  # fmt: skip


def make_jetson(
    root: Path,
    monitors: dict[str, dict[int, tuple[str, int, int]]],
    *,
    driver: str = "ina3221",
    gpu: str = "17000000.gpu",
    model: str = "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
) -> Path:
    """Write the files that a board has; mV, mA, m°C, Hz and kHz as the kernel gives them."""
    for number, (address, channels) in enumerate(monitors.items()):
        hwmon = root / "sys/bus/i2c/drivers" / driver / address / "hwmon" / f"hwmon{number + 1}"
        for channel, (label, millivolts, milliamperes) in channels.items():
            put(hwmon / f"in{channel}_label", label)
            put(hwmon / f"in{channel}_input", millivolts)
            put(hwmon / f"curr{channel}_input", milliamperes)
            put(hwmon / f"in{channel + 3}_input", 40)  # shunt voltages, in µV
        put(hwmon / "in7_label", "sum of shunt voltages")
        put(hwmon / "in7_input", 120)
    thermal = root / "sys/class/thermal"
    for number, (zone, heat) in enumerate([("cpu-thermal", 48_500), ("gpu-thermal", 46_250)]):
        put(thermal / f"thermal_zone{number}" / "type", zone)
        put(thermal / f"thermal_zone{number}" / "temp", heat)
    put(thermal / "cooling_device0" / "type", "pwm-fan")
    put(root / "sys/class/devfreq" / gpu / "cur_freq", 918_000_000)
    put(root / "sys/class/devfreq/15340000.vic/cur_freq", 115_200_000)
    put(root / "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq", 1_984_000)
    put(root / "proc/device-tree/model", model + "\0")
    return root


def put(path: Path, value: object) -> None:
    """Write one file of sysfs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


class SeveralGpus:
    """NVML with a GPU for each of ``names``; each answers as a :class:`FakeNvml` of its own."""

    def __init__(self, *names: str, gpus: dict[int, FakeNvml] | None = None) -> None:
        self.gpus = [(gpus or {}).get(n, FakeNvml()) for n in range(len(names))]
        self.names = names

    NVMLError = FakeNvml(**{}).NVMLError
    NVML_SUCCESS = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.159.04"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return SimpleNamespace(index=index)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle.index:08d}"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return self.names[handle.index]

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda handle, *more: getattr(self.gpus[handle.index], name)("handle", *more)
