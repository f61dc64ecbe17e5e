"""NVML's GPUs as :class:`~opkit.sensors.levels.Sensors`: which are read, and their sums."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opkit.errors import BadInput
from opkit.sensors.levels import Levels
from opkit.sensors.meter import LEAD, LEAD_AVERAGED, Meter, choose_meter
from opkit.sensors.nvml import THROTTLES, Gpu

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """One GPU that NVML lists.

    Attributes:
        index: NVML's, which is the order of PCI bus ids.
        uuid, name: as NVML tells them.
        gpu: its sensors.
    """

    index: int
    uuid: str
    name: str
    gpu: Gpu

    @property
    def label(self) -> str:
        """Its name in :class:`~opkit.sensors.levels.Levels`."""
        return f"GPU {self.index}"


class NvmlSensors:
    """Board power, temperature and clocks of some GPUs.

    Args:
        gpus: those to read; watts are their sum.
        driver: the driver's version; empty: not told.
        listed: how many GPUs NVML lists in all.
    """

    kind = "nvml"

    def __init__(self, gpus: Sequence[Found], driver: str = "", listed: int = 0) -> None:
        self._gpus = tuple(gpus)
        self._listed = max(listed, len(gpus))
        self._driver = driver
        self.heat = tuple(found.label for found in gpus)
        self.clock = tuple(f"{found.label} SM" for found in gpus)
        self._choice = self._choose()
        names = ", ".join(found.label for found in gpus)
        self.scope = f"whole board of {names}" if self._choice else ""

    def facts(self) -> dict[str, Any]:
        """GPUs by index, UUID, name and power limit in W; how many there are in all; driver."""
        gpus = [
            {
                "index": found.index,
                "uuid": found.uuid,
                "name": found.name,
                "power_limit_w": found.gpu.power_limit_watts(),
            }
            for found in self._gpus
        ]
        return {"gpus": gpus, "listed": self._listed, "driver": self._driver}

    def levels(self) -> Levels:
        """One reading of every GPU."""
        states = [(found.label, found.gpu.state()) for found in self._gpus]
        clocks = {f"{label} SM": state.sm_mhz for label, state in states}
        clocks |= {f"{label} memory": state.memory_mhz for label, state in states}
        reasons = sorted({why for _, state in states for why in state.throttle})
        return Levels(
            power=_told({label: state.power_w for label, state in states}),
            temp=_told({label: state.temperature_c for label, state in states}),
            freq=_told(clocks),
            throttle=tuple(why for why in reasons if why in THROTTLES),
        )

    def meter(self) -> Meter | None:
        """The best way that all of the GPUs have; joules or watts are their sum."""
        return self._choice

    def _choose(self) -> Meter | None:
        meters = [choose_meter(found.gpu) for found in self._gpus]
        if not meters or None in meters:
            return None
        if all(meter is not None and meter.counts for meter in meters):
            return Meter("energy counter", _sum([f.gpu.energy_joules for f in self._gpus]), True,
                         LEAD)  # fmt: skip
        read = _sum([found.gpu.power_watts for found in self._gpus])
        read()  # tells which of NVML's two powers there is
        if all(found.gpu.instant for found in self._gpus):
            return Meter("sampling of instantaneous power", read, False, LEAD)
        return Meter("sampling of the 1 s average", read, False, LEAD_AVERAGED)


def open_gpus(wanted: str = "", count: int = 1, nvml: Any = None) -> NvmlSensors | None:
    """The sensors of the GPUs that a run uses.

    Args:
        wanted: NVML indices or UUIDs, separated by commas; empty: as many as ``count`` of those
            in ``CUDA_VISIBLE_DEVICES``, else of all.
        nvml: stands in for the module ``pynvml``.

    Returns:
        None when NVML cannot be used or lists no GPU; why is logged.

    Raises:
        BadInput: ``wanted`` names a GPU that is not there.
    """
    try:
        nvml = nvml if nvml is not None else importlib.import_module("pynvml")
    except ImportError as error:
        _LOG.info("NVML: pynvml is missing (%s)", error)
        return None
    try:
        nvml.nvmlInit()
        found = [_found(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as error:
        _LOG.info("NVML: not usable (%s)", error)
        return None
    chosen = _chosen(found, wanted, count)
    return NvmlSensors(chosen, driver, len(found)) if chosen else None


def _chosen(found: list[Found], wanted: str, count: int) -> list[Found]:
    if wanted:
        return [_named(found, name.strip(), "--gpus") for name in wanted.split(",")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if not visible:
        return found[:count]
    # CUDA numbers GPUs by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID; equal GPUs keep bus order.
    names = [name.strip() for name in visible.split(",")][:count]
    known = [name for name in names if _matches(found, name)]
    if len(known) < len(names):
        _LOG.warning("CUDA_VISIBLE_DEVICES=%s names GPUs that NVML does not list", visible)
    return [_named(found, name, "CUDA_VISIBLE_DEVICES") for name in known]


def _matches(found: list[Found], name: str) -> list[Found]:
    return [gpu for gpu in found if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]


def _named(found: list[Found], name: str, where: str) -> Found:
    matches = _matches(found, name)
    if not matches:
        listed = ", ".join(str(gpu.index) for gpu in found) or "none"
        raise BadInput(f"{where}: no GPU {name!r}; NVML lists {listed}")
    return matches[0]


def _found(nvml: Any, index: int) -> Found:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
    return Found(index, uuid, name, Gpu(nvml, handle))


def _text(value: str | bytes) -> str:
    """Older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _told(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _sum(reads: Sequence[Callable[[], float | None]]) -> Callable[[], float | None]:
    def total() -> float | None:
        values = [read() for read in reads]
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return total
