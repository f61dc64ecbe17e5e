"""Stands in for ``pynvml``: its real function names, one GPU, and answers that a test sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
# Functions whose answer depends on their argument, and so stands under another name.
ASKED_WITH = {
    "nvmlDeviceGetClockInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetFieldValues",
}


class NVMLError(Exception):
    """As ``pynvml.NVMLError``."""


class NVMLError_NotSupported(NVMLError):  # NVML's name
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_Unknown(NVMLError):
    pass


class FakeNvml:
    """One H100 at work. ``answers`` may hold a value, an exception, or a list used up in turn."""

    NVMLError = NVMLError
    NVML_SUCCESS = 0
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVML_FI_DEV_POWER_INSTANT = 186

    def __init__(self, **answers: Any) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "sm": 1980,
            "memory": 2619,
            "highest sm": 1980,
            "nvmlDeviceGetTemperatureV": 41,
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "instant": 412_500,
            "nvmlDeviceGetPowerUsage": 400_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
            **answers,
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def function(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "nvmlDeviceGetHandleByUUID" and arguments[0] != UUID:
                raise NVMLError_NotFound(arguments[0])
            if name == "nvmlDeviceGetClockInfo":
                return self._answer({1: "sm", 2: "memory"}[arguments[1]])
            if name == "nvmlDeviceGetMaxClockInfo":
                return self._answer({1: "highest sm"}[arguments[1]])
            if name == "nvmlDeviceGetFieldValues":
                assert arguments[1] == [self.NVML_FI_DEV_POWER_INSTANT]
                return [_field_value(self._answer("instant"))]
            return self._answer(name)

        if name not in ASKED_WITH | set(self.answers):
            raise AttributeError(name)
        return function

    def _answer(self, name: str) -> Any:
        answer = self.answers[name]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def _field_value(milliwatts: int | None) -> SimpleNamespace:
    """As ``c_nvmlFieldValue_t``; None: this GPU does not have the field."""
    if milliwatts is None:
        return SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))
    return SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=milliwatts))
