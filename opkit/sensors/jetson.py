"""A Jetson's sensors through sysfs: INA3221 power rails, thermal zones, clocks of GPU and CPU.

Layout of Jetson Linux 35 and 36 (JetPack 5 and 6): the kernel's ``Documentation/hwmon/ina3221.rst``
(``in[123]_label``, ``in[123]_input`` in mV, ``curr[123]_input`` in mA; channel 7 is a sum of shunt
voltages), its ``Documentation/driver-api/thermal/sysfs-api.rst`` (``temp`` in m°C) and
``Documentation/ABI/testing/sysfs-class-devfreq`` (``cur_freq``, Hz for the GPU). The rails of each
module: *Jetson Linux Developer Guide*, "Platform Power and Performance". Jetson Linux 32
(``iio:device*``) has another layout and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opkit.errors import BadInput
from opkit.sensors.levels import Levels
from opkit.sensors.meter import LEAD, Meter

# Rails that feed the whole module, so that all others branch off: Orin NX and Nano, Xavier NX, TX2.
MODULE_INPUT = ("VDD_IN", "POM_5V_IN", "5V_IN")
# AGX Orin has no such rail: its power is taken as VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0. The
# memory rail is left out, as the field has it (it is fed from the last); --rails changes the sum.
INSIDE = {"VDDQ_VDD2_1V8AO": "VIN_SYS_5V0"}
NOT_CONNECTED = "NC"
# The GPU's devfreq folder: 17000000.gpu (JetPack 6), 17000000.ga10b (5), 17000000.gv11b (Xavier).
_GPU = re.compile(r"gpu|ga10b|gv11b|gp10b|gm20b")
_HERTZ, _KILOHERTZ = 1e-6, 1e-3  # to MHz
_MILLI = 1e-3


@dataclass(frozen=True)
class Rail:
    """One channel of a power monitor.

    Attributes:
        name: its label.
        millivolts, milliamperes: the files.
    """

    name: str
    millivolts: Path
    milliamperes: Path

    def watts(self) -> float | None:
        """Power now; None where the driver does not answer."""
        volts, amperes = _number(self.millivolts), _number(self.milliamperes)
        return None if volts is None or amperes is None else volts * amperes * _MILLI * _MILLI


class JetsonSensors:
    """What sysfs tells.

    Args:
        root: where ``sys`` lies; ``/`` but for tests.
        rails: those whose sum is the power; empty: the module's input, else all that do not feed
            one another.

    Raises:
        BadInput: there is no rail of such a name.
    """

    kind = "jetson"

    def __init__(self, root: Path = Path("/"), rails: tuple[str, ...] = ()) -> None:
        self._root = root
        self._rails = list(_rails(root))
        self._zones = list(_zones(root))
        self._clocks = list(_clocks(root))
        self._summed = _summed([rail.name for rail in self._rails], rails)
        self.heat = tuple(name for name, _ in self._zones if name.lower().startswith("gpu"))
        self.clock = tuple(name for name, *_ in self._clocks if name == "GPU")
        self.scope = "" if not self._summed else "rail " + " + ".join(self._summed)

    def __bool__(self) -> bool:
        """Whether there is a power monitor, which every Jetson module since TX1 has."""
        return bool(self._rails)

    def facts(self) -> dict[str, Any]:
        """The board's model and the names of what is read."""
        return {
            "board": _text(self._root / "proc/device-tree/model").rstrip("\0"),
            "rails": [rail.name for rail in self._rails],
            "zones": [name for name, _ in self._zones],
        }

    def levels(self) -> Levels:
        """One reading of every file."""
        watts = {rail.name: rail.watts() for rail in self._rails}
        heat = {name: _number(path, _MILLI) for name, path in self._zones}
        mhz = {name: _number(path, unit) for name, path, unit in self._clocks}
        return Levels(power=_told(watts), temp=_told(heat), freq=_told(mhz))

    def meter(self) -> Meter | None:
        """Sampling; the monitor averages over its own conversion time (a few ms) only."""
        return (
            Meter("sampling of INA3221 rails", self._total, False, LEAD) if self._summed else None
        )

    def _total(self) -> float | None:
        values = [rail.watts() for rail in self._rails if rail.name in self._summed]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None


def _summed(names: list[str], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The rails whose sum is the module's power, none of them twice."""
    if missing := [name for name in wanted if name not in names] if names else []:
        raise BadInput(f"--rails: no rail {missing[0]!r}; there are {', '.join(names)}")
    if wanted:
        return wanted
    for name in MODULE_INPUT:
        if name in names:
            return (name,)
    return tuple(name for name in names if INSIDE.get(name) not in names)


def _rails(root: Path) -> Iterator[Rail]:
    """The driver is ``ina3221`` in JetPack 5 and 6, ``ina3221x`` in older kernels."""
    for folder in sorted((root / "sys/bus/i2c/drivers").glob("ina3221*/*/hwmon/hwmon*")):
        for channel in (1, 2, 3):  # 4 to 7 are shunt voltages
            name = _text(folder / f"in{channel}_label")
            current = folder / f"curr{channel}_input"
            if name and name != NOT_CONNECTED and current.exists():
                yield Rail(name, folder / f"in{channel}_input", current)


def _zones(root: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        if name := _text(folder / "type"):
            yield name, folder / "temp"


def _clocks(root: Path) -> Iterator[tuple[str, Path, float]]:
    """Name, file and the factor that makes MHz of its number."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    for folder in [folder for folder in folders if _GPU.search(folder.name)][:1]:
        yield "GPU", folder / "cur_freq", _HERTZ
    for policy in sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy*")):
        yield f"CPU {policy.name}", policy / "scaling_cur_freq", _KILOHERTZ
    memory = root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"  # root only
    if _number(memory) is not None:
        yield "EMC", memory, _HERTZ


def _told(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _text(path: Path) -> str:
    """A file's one line; empty when it cannot be read."""
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:  # a zone that is off answers EAGAIN, an unbound channel ENODATA
        return ""


def _number(path: Path, factor: float = 1.0) -> float | None:
    try:
        return float(_text(path)) * factor
    except ValueError:
        return None
