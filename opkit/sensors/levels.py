"""One interface to whatever tells of power, heat and clocks: NVML, a Jetson's sysfs, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from opkit.sensors.meter import Meter


@dataclass(frozen=True)
class Levels:
    """What all sensors showed at one moment, by name; a sensor that did not answer is left out.

    Attributes:
        power: watts of each GPU or rail.
        temp: °C of each GPU or thermal zone.
        freq: MHz of each clock.
        throttle: reasons that lower a clock and cost time, in NVML's words.
    """

    power: Mapping[str, float] = field(default_factory=dict)
    temp: Mapping[str, float] = field(default_factory=dict)
    freq: Mapping[str, float] = field(default_factory=dict)
    throttle: tuple[str, ...] = ()


class Sensors(Protocol):
    """All sensors of a machine. Nothing here raises: what is not told is left out.

    Attributes:
        kind: ``nvml``, ``jetson`` or ``none``.
        scope: what the watts are the watts of, in words; empty without power.
        heat: names in ``Levels.temp`` that are the GPU's.
        clock: names in ``Levels.freq`` that are the GPU's core clock.
    """

    @property
    def kind(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def heat(self) -> tuple[str, ...]: ...
    @property
    def clock(self) -> tuple[str, ...]: ...

    def facts(self) -> dict[str, Any]:
        """Names and versions of what is read, as plain data."""

    def levels(self) -> Levels:
        """Power, heat and clocks now."""

    def meter(self) -> Meter | None:
        """How mean power is measured; None where there is no power."""


@dataclass(frozen=True)
class NoSensors:
    """Tells nothing, so that a benchmark runs on any machine."""

    kind: str = "none"
    scope: str = ""
    heat: tuple[str, ...] = ()
    clock: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    def levels(self) -> Levels:
        """Nothing is measured."""
        return Levels()

    def meter(self) -> Meter | None:
        """There is no power."""
        return None
