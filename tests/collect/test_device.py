"""What a CUDA device does in which order, on a torch that writes it down; and the CPU."""

from __future__ import annotations

import sys

import pytest
from fake_torch import BARE_UUID, SPIN, FakeTorch

from opkit.collect.timing.device import CpuDevice, CudaDevice, Pace, open_device
from opkit.errors import ToolMissing
from opkit.sensors.nvml import Gpu


def cuda(torch: FakeTorch) -> CudaDevice:
    sleep = lambda seconds: torch.log.append(f"rest {seconds}")  # noqa: E731
    return CudaDevice(0, torch, Gpu(), clock=lambda: torch.now / 1e9, sleep=sleep)


def test_back_to_back_nothing_is_awaited_between_iterations() -> None:
    torch = FakeTorch()
    device = cuda(torch)
    samples = device.time(torch.kernels(("a", 200_000), ("b", 50_000)), 3, Pace(lead=1e-4))
    assert samples == [0.25, 0.25, 0.25]
    assert torch.log == [
        *["new event"] * 6,
        "wait",
        "spin 200000",
        *["event", "forward", "event"] * 3,
        "wait",
    ]


def test_events_are_made_once() -> None:
    torch = FakeTorch()
    device = cuda(torch)
    device.time(torch.kernels(("a", 1)), 3)
    device.time(torch.kernels(("a", 1)), 2)
    assert torch.log.count("new event") == 6


def test_a_rest_begins_on_an_idle_gpu_and_lies_outside_the_events() -> None:
    torch = FakeTorch()
    samples = cuda(torch).time(torch.kernels(("a", 2_000_000)), 2, Pace(rest=0.014, lead=1e-4))
    assert samples == [2.0, 2.0]
    once = ["rest 0.014", "spin 200000", "event", "forward", "event", "wait"]
    assert torch.log[4:] == ["wait", *once, *once, "wait"]


def test_a_sweep_reads_twice_the_cache_before_each_iteration_outside_the_events() -> None:
    torch = FakeTorch()
    samples = cuda(torch).time(torch.kernels(("a", 250_000)), 2, Pace(cold=True))
    assert samples == [0.25, 0.25]
    assert torch.log[4:] == [
        "wait",
        "zeros 25 on cuda:0",  # of 4 bytes: 100, and the cache has 50
        *["sweep", "event", "forward", "event"] * 2,
        "wait",
    ]


def test_the_look_is_taken_once_while_the_last_iteration_runs() -> None:
    torch = FakeTorch()
    cuda(torch).time(torch.kernels(("a", 1)), 2, during=lambda: torch.log.append("look"))
    assert torch.log[-5:] == ["event", "forward", "event", "look", "wait"]


def test_a_trace_sums_what_lies_between_markers() -> None:
    torch = FakeTorch()
    forward = torch.kernels(("gemm", 200_000), ("norm", 3_000), ("gemm", 100_000))
    trace = cuda(torch).trace(forward, 3, Pace(rest=0.01, cold=True), before=2)
    assert trace.problem == ""
    assert trace.gpu_ms == (0.303,) * 3
    assert [(k.name, k.calls, k.us) for k in trace.kernels] == [
        ("gemm", 2, 300.0),
        ("norm", 1, 3.0),
    ]
    assert torch.log.count("forward") == 5
    assert torch.log.count("rest 0.01") == 5
    assert torch.log.index("profiled") > torch.log.index("profile")
    assert torch.recorded is None  # nothing is left on


def test_a_trace_that_lost_its_markers_or_kernels_says_so() -> None:
    torch = FakeTorch()
    torch.lose = lambda name: name == SPIN
    assert "0 of 6 markers" in cuda(torch).trace(torch.kernels(("a", 1)), 3, Pace()).problem
    torch.lose = lambda name: name == "a"
    trace = cuda(torch).trace(torch.kernels(("a", 1)), 3, Pace())
    assert "without any traced kernel" in trace.problem
    assert (trace.gpu_ms, trace.kernels) == ((), ())


def test_running_for_a_time_queues_few_chunks_ahead() -> None:
    torch = FakeTorch()
    run = cuda(torch).run(torch.kernels(("a", 10_000_000)), 0.1, 2)
    assert run.iterations == 10
    assert run.seconds == pytest.approx(0.1)
    assert torch.log.count("mark") == 5
    assert torch.log.count("wait for mark") == 3
    assert torch.log[-1] == "wait"


def test_a_cuda_device_names_itself() -> None:
    device = cuda(FakeTorch())
    assert device.name == "NVIDIA H100 80GB HBM3"
    assert device.uuid == f"GPU-{BARE_UUID}"
    assert device.memory() == (60, 80)


def test_closing_and_freeing() -> None:
    torch = FakeTorch()
    device = cuda(torch)
    device.free_memory()
    assert torch.log == ["wait", "empty cache"]
    device.time(torch.kernels(("a", 1)), 1, Pace(cold=True))
    device.close()
    device.time(torch.kernels(("a", 1)), 1, Pace(cold=True))
    assert torch.log.count("zeros 25 on cuda:0") == 2


def test_opening_starts_the_tracer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    device = open_device()
    assert device.index == 0
    assert torch.log.count("profile") == 1


def test_a_tracer_that_sees_nothing_is_told_when_opening(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch = FakeTorch()
    torch.lose = lambda name: True  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    open_device()
    assert "0 of 2 markers were traced" in caplog.text


def test_without_cuda_there_is_the_cpu_unless_cuda_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert open_device().index == -1
    with pytest.raises(ToolMissing, match="torch cannot be imported"):
        open_device(kind="cuda")
    torch = FakeTorch()
    torch.cuda.is_available = lambda: False
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert open_device().index == -1
    with pytest.raises(ToolMissing, match="no CUDA device"):
        open_device(kind="cuda")


def test_the_cpu_is_timed_by_its_clock_without_rests_and_sweeps() -> None:
    now = 0.0

    def forward() -> None:
        nonlocal now
        now += 0.002

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    looks: list[float] = []
    device = CpuDevice(clock=lambda: now, sleep=sleep)
    samples = device.time(forward, 3, Pace(rest=0.5, cold=True), lambda: looks.append(now))
    assert samples == pytest.approx([2.0, 2.0, 2.0])
    assert now == pytest.approx(1.506)
    assert looks == [now]
    run = device.run(forward, 0.1, 5)
    assert (run.iterations, run.seconds) == (50, pytest.approx(0.1))
    assert device.trace(forward, 3, Pace()).gpu_ms == ()
    assert (device.uuid, device.index, device.memory()) == ("", -1, (0, 0))
