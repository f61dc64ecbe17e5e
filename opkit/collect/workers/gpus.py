"""The GPUs of this host, without starting CUDA: what lanes are made of."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU: its number among those that this process may use, its UUID and its name."""

    index: int
    uuid: str
    name: str


def list_gpus(nvml: Any = None) -> list[Gpu]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, in its order; none without a driver.

    Args:
        nvml: stands in for the module ``pynvml``.
    """
    nvml = nvml if nvml is not None else importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, no GPU: a host without is no error
        return []
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = [(_text(nvml.nvmlDeviceGetUUID(h)), _text(nvml.nvmlDeviceGetName(h)))
                 for h in handles]  # fmt: skip
    finally:
        nvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = [gpu for word in visible.split(",") for gpu in _named(word.strip(), found)]
    return [Gpu(number, uuid, name) for number, (uuid, name) in enumerate(found)]


def _named(word: str, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The GPU that a word of ``CUDA_VISIBLE_DEVICES`` names: a number or the start of a UUID."""
    if word.isdigit():
        return found[int(word) : int(word) + 1]
    return [gpu for gpu in found if word and gpu[0].startswith(word)]


def _text(value: str | bytes) -> str:
    """Older pynvml answers in bytes."""
    return value.decode() if isinstance(value, bytes) else value
