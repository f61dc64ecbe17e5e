"""``benchmark_with_power`` as the field's collectors call it, on a CPU and on a recorded torch."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import pytest
from fake_device import FakeDevice, FakeGpu
from fake_torch import FakeTorch

from opkit.collect import benchmark
from opkit.collect.benchmark import benchmark_with_power
from opkit.collect.measurement import Measurement, Power, Timing
from opkit.errors import BadInput
from opkit.layers.graphs import CaptureFailed

FIELD_KEYS = {"latency_ms", "power_stats", "throttled", "num_runs_executed", "used_cuda_graph"}
MORE_KEYS = {
    "samples_ms", "spread", "gpu_time_ms", "clocks", "host_bound", "graph_error", "notes",
}  # fmt: skip
SHORT = Timing(max_iterations=8)


def work() -> None:
    sum(range(5_000))


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    """A torch with one CUDA device, where no NVML is."""
    made = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", made)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(benchmark, "_DEVICES", {})
    for variable in ("COLLECTOR_MEASURE_POWER", "COLLECTOR_POWER_MIN_DURATION"):
        monkeypatch.delenv(variable, raising=False)
    return made


def test_on_a_cpu_it_runs_eagerly_with_all_keys() -> None:
    with benchmark_with_power("cpu", work, num_warmups=2, num_runs=6, timing=SHORT) as results:
        pass
    assert set(results) == FIELD_KEYS | MORE_KEYS
    assert results["latency_ms"] == statistics.median(results["samples_ms"]) > 0
    assert results["num_runs_executed"] == len(results["samples_ms"]) >= 6
    assert results["used_cuda_graph"] is False
    assert (results["gpu_time_ms"], results["host_bound"]) == (None, None)
    assert results["power_stats"] is None
    assert results["throttled"] is False


def test_a_graph_is_captured_measured_and_freed(torch: FakeTorch) -> None:
    kernel = torch.kernels(("gemm", 500_000))
    with benchmark_with_power("cuda:0", kernel, repeat_n=4) as results:
        assert "empty cache" not in torch.log
    assert results["used_cuda_graph"] is True
    assert results["latency_ms"] == pytest.approx(0.5)  # a graph of 4 takes 2 ms
    assert results["gpu_time_ms"] == pytest.approx(0.5)
    assert results["spread"] == 0.0
    assert results["host_bound"] is False
    assert "captured 4" in torch.log
    replayed = torch.log[torch.log.index("captured 4") :]
    assert "forward" not in replayed
    assert torch.log[0] == "enter device 0"
    assert torch.log[-1] == "leave device 0"
    assert "empty cache" in torch.log[-5:]


def test_without_a_graph_it_launches_each_call(torch: FakeTorch) -> None:
    kernel = torch.kernels(("gemm", 500_000))
    with benchmark_with_power("cuda", kernel, repeat_n=4, use_cuda_graph=False) as results:
        pass
    assert results["used_cuda_graph"] is False
    assert results["latency_ms"] == pytest.approx(0.5)
    assert results["host_bound"] is False
    assert "replay" not in torch.log
    assert torch.log.count("forward") % 4 == 0


def test_a_failed_capture_falls_back_when_allowed_says_why_and_frees(torch: FakeTorch) -> None:
    torch.capture = "operation not permitted when stream is capturing"
    kernel = torch.kernels(("gemm", 500_000))
    with benchmark_with_power("cuda:0", kernel, allow_graph_fail=True) as results:
        assert "empty cache" in torch.log  # before measuring, not only at the end
    assert results["used_cuda_graph"] is False
    assert "operation not permitted" in results["graph_error"]
    assert results["latency_ms"] == pytest.approx(0.5)
    assert torch.log[-2:] == ["empty cache", "leave device 0"]


def test_a_failed_capture_is_an_error_otherwise(torch: FakeTorch) -> None:
    torch.capture = "operation not permitted"
    with (
        pytest.raises(CaptureFailed, match="operation not permitted"),
        benchmark_with_power("cuda:0", torch.kernels(("gemm", 500_000))),
    ):
        pytest.fail("the block must not run")
    assert "empty cache" in torch.log
    assert torch.log[-1] == "leave device 0"


def test_the_graph_is_freed_when_the_block_fails(torch: FakeTorch) -> None:
    with (
        pytest.raises(KeyError),
        benchmark_with_power("cuda:0", torch.kernels(("gemm", 500_000))) as results,
    ):
        results["no such key"]
    assert "empty cache" in torch.log[-5:]


def test_a_device_is_opened_once(torch: FakeTorch) -> None:
    for _ in range(2):
        with benchmark_with_power("cuda:0", torch.kernels(("gemm", 500_000))):
            pass
    assert list(benchmark._DEVICES) == [0]


def ask(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> tuple[bool, float]:
    """Whether power is measured, and for how long, with these arguments."""
    seen: list[Timing] = []
    real = benchmark.measure

    def measure(forward: Any, timing: Timing, *more: Any, **named: Any) -> Any:
        seen.append(timing)
        return real(forward, Timing(max_iterations=8), *more, **named)

    monkeypatch.setattr(benchmark, "measure", measure)
    device = FakeDevice(iter([1.0]), FakeGpu())
    with benchmark_with_power(device, work, use_cuda_graph=False, **arguments):
        pass
    return seen[0].power, seen[0].power_seconds


@pytest.mark.parametrize(
    ("value", "measured"), [("true", True), ("1", True), ("YES", True), ("0", False), ("", False)]
)
def test_the_variables_of_the_field_are_honoured(
    monkeypatch: pytest.MonkeyPatch, value: str, measured: bool
) -> None:
    monkeypatch.setenv("COLLECTOR_MEASURE_POWER", value)
    monkeypatch.setenv("COLLECTOR_POWER_MIN_DURATION", "2.5")
    assert ask(monkeypatch) == (measured, 2.5)
    assert ask(monkeypatch, measure_power=not measured, power_min_duration=0.5) == (
        not measured,
        0.5,
    )


def test_a_duration_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLECTOR_POWER_MIN_DURATION", "long")
    with pytest.raises(BadInput, match="'long' is no number"), benchmark_with_power("cpu", work):
        pass


@pytest.mark.parametrize("device", ["tpu:0", "cuda:x", 3])
def test_other_devices_are_refused(device: object) -> None:
    with pytest.raises(BadInput, match="cannot measure on"), benchmark_with_power(device, work):
        pass


@pytest.mark.parametrize("wrong", [{"num_runs": 0}, {"repeat_n": 0}])
def test_counts_below_one_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="at least 1"), benchmark_with_power("cpu", work, **wrong):
        pass


def test_power_is_given_under_the_names_of_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    power = Power(412.0, 700.0, 0.4, "energy counter", 1.0, 0, 0.001)
    monkeypatch.setattr(
        benchmark, "measure", lambda *_, **__: Measurement(elapsed_ms=(1.0,) * 6, power=power)
    )
    with benchmark_with_power("cpu", work, measure_power=True) as results:
        pass
    assert results["power_stats"] == {"power": 412.0, "power_limit": 700.0}


def test_torch_devices_are_understood() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    weight = torch.randn(64, 64)
    with benchmark_with_power(
        torch.device("cpu"), lambda: weight @ weight, timing=SHORT
    ) as results:
        pass
    assert results["latency_ms"] > 0
