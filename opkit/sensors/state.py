"""What a GPU tells of itself at one moment, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuState:
    """The GPU at one moment, by NVML; None where the GPU does not tell.

    ``throttle`` are the reasons that NVML gives for a lowered clock, in its own words.
    """

    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttle: tuple[str, ...] = ()
