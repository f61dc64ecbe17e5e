"""What NVML tells of one GPU: clocks, temperature, power, energy, and why a clock is lowered.

NVML is asked in the middle of timing, so nothing here raises: what is not told is None, and the
reason is logged once. The GPU is named by its UUID, since CUDA's and NVML's indices differ as soon
as ``CUDA_VISIBLE_DEVICES`` is set.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from opkit.sensors.state import GpuState

_LOG = logging.getLogger(__name__)

# nvml.h, nvmlClocksEventReason* (in drivers before 535 nvmlClocksThrottleReason*): the bits of a
# lowered clock, under NVML's own names.
REASONS = {
    0x001: "GpuIdle",
    0x002: "ApplicationsClocksSetting",
    0x004: "SwPowerCap",
    0x008: "HwSlowdown",
    0x010: "SyncBoost",
    0x020: "SwThermalSlowdown",
    0x040: "HwThermalSlowdown",
    0x080: "HwPowerBrakeSlowdown",
    0x100: "DisplayClockSetting",
    0x200: "BoardLimit",
    0x400: "Reliability",
}
# Those that mean: the work would have run faster, had it drawn less power or been cooler. The
# others are settings of the host, the same for every case.
THROTTLES = frozenset(
    {
        "SwPowerCap",
        "HwSlowdown",
        "SwThermalSlowdown",
        "HwThermalSlowdown",
        "HwPowerBrakeSlowdown",
        "BoardLimit",
        "Reliability",
    }
)
_LOST = (  # NVML's answers that will not change while the process lives
    "NVMLError_NotSupported",
    "NVMLError_FunctionNotFound",
    "NVMLError_NoPermission",
)


class Gpu:
    """What NVML tells of one GPU, at any moment.

    Args:
        nvml: the module ``pynvml``, initialised; None when there is none to ask.
        handle: NVML's handle of the GPU.
    """

    def __init__(self, nvml: Any = None, handle: Any = None) -> None:
        self._nvml = nvml
        self._handle = handle
        self._told: set[str] = set()  # functions of which a failure was logged
        self._lost: set[str] = set()  # functions not to be asked again
        self.instant = True  # whether power_watts is instantaneous, not a 1 s average

    def state(self) -> GpuState:
        """Clocks in MHz, temperature in °C, power in W and the reasons of a lowered clock, now."""
        if self._nvml is None:
            return GpuState()
        return GpuState(
            sm_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM),
            memory_mhz=self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_MEM),
            temperature_c=self._temperature(),
            power_w=self.power_watts(),
            throttle=self._reasons(),
        )

    def highest_sm_mhz(self) -> int | None:
        """The highest clock of the SMs, MHz."""
        if self._nvml is None:
            return None
        mhz: int | None = self._ask("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM)
        return mhz

    def power_limit_watts(self) -> float | None:
        """The limit that is in force, watts."""
        return _thousandth(self._ask("nvmlDeviceGetEnforcedPowerLimit"))

    def energy_joules(self) -> float | None:
        """Energy since the driver was loaded, joules; GPUs since Volta count it."""
        return _thousandth(self._ask("nvmlDeviceGetTotalEnergyConsumption"))

    def power_watts(self) -> float | None:
        """Power now, watts.

        By the field ``NVML_FI_DEV_POWER_INSTANT``; where there is none by
        ``nvmlDeviceGetPowerUsage``, which since Ampere (but for GA100) is the mean of the last
        second (nvml.h). ``instant`` says which one it was.
        """
        now = self._field("NVML_FI_DEV_POWER_INSTANT") if self.instant else None
        if now is None:
            now = self._ask("nvmlDeviceGetPowerUsage")
            self.instant = self.instant and now is None
        return _thousandth(now)

    def _temperature(self) -> int | None:
        celsius: int | None = None
        for function in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"):  # new, old name
            if celsius is None:
                celsius = self._ask(function, self._nvml.NVML_TEMPERATURE_GPU)
        return celsius

    def _reasons(self) -> tuple[str, ...]:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name in drivers before 535
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return tuple(name for bit, name in REASONS.items() if (bits or 0) & bit)

    def _field(self, name: str) -> int | None:
        """One field value of type unsigned int, of the GPU itself (scope 0)."""
        if self._nvml is None:
            return None
        values = self._ask("nvmlDeviceGetFieldValues", [getattr(self._nvml, name, 0)])
        if values is None or values[0].nvmlReturn != self._nvml.NVML_SUCCESS:
            return None
        return int(values[0].value.uiVal)

    def _ask(self, function: str, *arguments: Any) -> Any:
        """NVML's answer, or None when it has none; the first failure of a function is logged."""
        if self._nvml is None or function in self._lost:
            return None
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except (self._nvml.NVMLError, AttributeError) as error:
            # AttributeError: an older pynvml that lacks the function.
            if isinstance(error, AttributeError) or type(error).__name__ in _LOST:
                self._lost.add(function)
            if function not in self._told:
                self._told.add(function)
                _LOG.info("NVML: %s gives nothing (%s)", function, error)
            return None


def open_gpu(uuid: str, nvml: Any = None) -> Gpu:
    """The sensors of the GPU with ``uuid`` (as ``GPU-…``).

    Args:
        uuid: from the framework.
        nvml: stands in for the module ``pynvml``.

    Returns:
        A :class:`Gpu` that knows nothing when NVML cannot be used; that is logged as a warning.
    """
    try:
        nvml = nvml if nvml is not None else importlib.import_module("pynvml")
    except ImportError as error:
        _LOG.warning("no clocks, temperature or power: pynvml is missing (%s)", error)
        return Gpu()
    try:
        nvml.nvmlInit()
        return Gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError as error:
        _LOG.warning("no clocks, temperature or power: NVML does not know %s (%s)", uuid, error)
        return Gpu()


def _thousandth(value: int | None) -> float | None:
    """NVML counts milliwatts and millijoules."""
    return None if value is None else value / 1000
