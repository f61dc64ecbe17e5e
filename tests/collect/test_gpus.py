"""Which GPUs there are, told by a made NVML with the real one's functions."""

from __future__ import annotations

import pytest

from opkit.collect.workers.gpus import Gpu, list_gpus


class Nvml:
    """Three GPUs; names in bytes, as older pynvml gives them."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int = 3, driver: bool = True) -> None:
        self.count, self.driver, self.open = count, driver, 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{'abc'[handle]}0"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100 80GB HBM3" if handle < 2 else b"NVIDIA T4"


def test_all_gpus_and_nvml_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    found = list_gpus(nvml)
    assert [gpu.uuid for gpu in found] == ["GPU-a0", "GPU-b0", "GPU-c0"]
    assert found[2] == Gpu(2, "GPU-c0", "NVIDIA T4")
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("2,0", ["GPU-c0", "GPU-a0"]),
        ("GPU-b", ["GPU-b0"]),
        ("", []),
        ("7", []),
    ],
)
def test_the_environment_chooses(
    monkeypatch: pytest.MonkeyPatch, visible: str, uuids: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = list_gpus(Nvml())
    assert [gpu.uuid for gpu in found] == uuids
    assert [gpu.index for gpu in found] == list(range(len(uuids)))


def test_a_host_without_a_driver_has_none() -> None:
    assert list_gpus(Nvml(driver=False)) == []
