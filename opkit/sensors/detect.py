"""Which sensors this machine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opkit.errors import ToolMissing
from opkit.sensors.jetson import JetsonSensors
from opkit.sensors.levels import NoSensors, Sensors
from opkit.sensors.nvml_gpus import open_gpus

KINDS = ("auto", "nvml", "jetson", "none")


def detect(
    kind: str = "auto",
    gpus: str = "",
    count: int = 1,
    rails: tuple[str, ...] = (),
    *,
    root: Path = Path("/"),
    nvml: Callable[[str, int], Sensors | None] = open_gpus,
) -> Sensors:
    """The machine's sensors.

    In the order NVML, Jetson, none. NVML comes first only where it tells power: on a Jetson it may
    list the GPU and know nothing of it.

    Args:
        kind: one of :data:`KINDS`; other than ``auto``: this or nothing.
        gpus: see :func:`opkit.sensors.nvml_gpus.open_gpus`.
        count: how many GPUs the run uses.
        rails: see :class:`opkit.sensors.jetson.JetsonSensors`.
        root: where sysfs lies, for tests.
        nvml: opens NVML's GPUs.

    Raises:
        ToolMissing: the kind that was asked for is not there.
        BadInput: ``gpus`` or ``rails`` name one that is not there.
    """
    if kind == "none":
        return NoSensors()
    found = nvml(gpus, count) if kind in ("auto", "nvml") else None
    board = JetsonSensors(root, rails) if kind in ("auto", "jetson") else None
    if kind == "nvml" and found is None:
        raise ToolMissing("--sensors nvml: NVML lists no GPU here", "nvidia-smi tells why")
    if kind == "jetson" and not board:
        raise ToolMissing(
            "--sensors jetson: no INA3221 below /sys/bus/i2c/drivers/ina3221*",
            "JetPack 5 and 6 have it; in a container, mount /sys",
        )
    if found is not None and (found.scope or not board):
        return found
    return board or NoSensors()
