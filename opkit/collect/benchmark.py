"""``benchmark_with_power``: the measurement, called as the field's collectors call theirs.

For those who bring a collector script along. Names, defaults and result keys are the ones of
aiconfigurator's ``collector/helper.py``; the numbers come from
:mod:`opkit.collect.timing.measure`.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

from opkit.collect.measurement import Measurement, Timing
from opkit.collect.timing.device import CpuDevice, CudaDevice, Device
from opkit.collect.timing.measure import host_bound, measure
from opkit.collect.timing.stats import half_width, median
from opkit.errors import BadInput
from opkit.layers.graphs import CapturedGraph, CaptureFailed
from opkit.layers.op import LaunchMode

_TRUE = ("true", "1", "yes")
_DEVICES: dict[int, Device] = {}  # CUDA devices opened by this process: events and NVML are kept


@contextmanager
def benchmark_with_power(
    device: Any,
    kernel_func: Callable[[], Any],
    num_warmups: int = 3,
    num_runs: int = 6,
    repeat_n: int = 1,
    measure_power: bool | None = None,
    power_min_duration: float | None = None,
    allow_graph_fail: bool = False,
    use_cuda_graph: bool = True,
    timing: Timing | None = None,
) -> Iterator[dict[str, Any]]:
    """Measure ``kernel_func`` and give the results to the ``with`` block.

    Args:
        device: ``torch.device``, its text as ``cuda:0``, or an opened
            :class:`opkit.collect.timing.device.Device`.
        kernel_func: launches the work once.
        num_warmups: least warm-up iterations.
        num_runs: least measured iterations; more are run until the median is known well enough.
        repeat_n: calls of ``kernel_func`` in one iteration; all times are per call.
        measure_power: default: the environment variable ``COLLECTOR_MEASURE_POWER``.
        power_min_duration: seconds; default: ``COLLECTOR_POWER_MIN_DURATION``, else 1.
        allow_graph_fail: run eagerly when a CUDA graph cannot be captured.
        use_cuda_graph: capture one; never on a CPU.
        timing: how to measure, where the other arguments do not say it.

    Yields:
        ``latency_ms`` (median elapsed time), ``power_stats`` (``power`` and ``power_limit`` in
        watts, or None), ``throttled``, ``num_runs_executed``, ``used_cuda_graph``; and further
        ``samples_ms``, ``spread`` (half-width of the median's 95 % confidence interval as a share
        of it; None below 5 samples), ``gpu_time_ms`` (None when it was not taken), ``clocks``
        (``before`` and ``after``), ``host_bound``, ``graph_error``, ``notes``.

    Raises:
        CaptureFailed: no graph could be captured and ``allow_graph_fail`` is not set.
        BadInput: an argument or a variable cannot be used.
    """
    if repeat_n < 1 or num_runs < 1:
        raise BadInput("repeat_n and num_runs must be at least 1")
    asked = replace(
        timing or Timing(),
        warmups=num_warmups,
        min_iterations=num_runs,
        max_iterations=max(num_runs, (timing or Timing()).max_iterations),
        power=_asked_for("COLLECTOR_MEASURE_POWER") if measure_power is None else measure_power,
        power_seconds=_duration() if power_min_duration is None else power_min_duration,
    )
    opened, current = _open(device)

    def repeated() -> None:
        for _ in range(repeat_n):
            kernel_func()

    with current:
        graph, graph_error = None, ""
        try:
            if use_cuda_graph and opened.index >= 0:
                graph, graph_error = _capture(kernel_func, repeat_n, allow_graph_fail)
            launch = LaunchMode.EAGER if graph is None else LaunchMode.GRAPH
            measured = measure(
                graph or repeated, asked, opened, launch, graph_error, by_elapsed=True
            )
            yield _results(measured, repeat_n)
        finally:
            if graph is not None:
                graph.free()
            if graph is not None or graph_error:
                gc.collect()
                opened.free_memory()


def _capture(
    kernel_func: Callable[[], Any], repeat_n: int, allow_fail: bool
) -> tuple[CapturedGraph | None, str]:
    """A graph of ``repeat_n`` calls, or why there is none."""
    try:
        return CapturedGraph(kernel_func, repeat_n), ""
    except CaptureFailed as error:
        if not allow_fail:
            raise
        return None, str(error)


def _results(measured: Measurement, repeat_n: int) -> dict[str, Any]:
    """What the ``with`` block is given; times are per call."""
    samples = [sample / repeat_n for sample in measured.elapsed_ms]
    spread = half_width(samples)
    power = measured.power
    return {
        "latency_ms": median(samples),
        "power_stats": power and {"power": power.watts, "power_limit": power.limit_watts},
        "throttled": measured.throttled,
        "num_runs_executed": len(samples),
        "used_cuda_graph": measured.launch is LaunchMode.GRAPH,
        "samples_ms": samples,
        "spread": spread if math.isfinite(spread) else None,
        "gpu_time_ms": median(measured.gpu_ms) / repeat_n if measured.gpu_ms else None,
        "clocks": {"before": asdict(measured.before), "after": asdict(measured.after)},
        "host_bound": host_bound(measured),
        "graph_error": measured.graph_error,
        "notes": list(measured.notes),
    }


def _open(device: Any) -> tuple[Device, AbstractContextManager[Any]]:
    """The device to measure on, and what makes it torch's current one.

    Raises:
        BadInput: ``device`` is neither a CUDA device nor a CPU.
    """
    if isinstance(device, CpuDevice) or str(device).split(":")[0] == "cpu":
        return (device if isinstance(device, CpuDevice) else CpuDevice()), nullcontext()
    if not isinstance(device, str) and hasattr(device, "trace"):  # an opened one
        return device, nullcontext()
    name, _, number = str(device).partition(":")
    if name != "cuda" or not (number.isdigit() or not number):
        raise BadInput(f"cannot measure on {str(device)!r}: name cuda, cuda:N or cpu")
    torch = importlib.import_module("torch")
    index = int(number) if number else int(torch.cuda.current_device())
    if index not in _DEVICES:
        _DEVICES[index] = CudaDevice(index, torch)
    return _DEVICES[index], torch.cuda.device(index)


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE


def _duration() -> float:
    """Seconds from ``COLLECTOR_POWER_MIN_DURATION``; 1 when it is not set."""
    text = os.environ.get("COLLECTOR_POWER_MIN_DURATION", "1.0")
    try:
        return float(text)
    except ValueError as error:
        raise BadInput(f"COLLECTOR_POWER_MIN_DURATION: {text!r} is no number") from error
