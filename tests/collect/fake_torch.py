"""As much of torch as a CUDA device is driven with; ``log`` holds what was done, in order.

The GPU of this torch runs a ``forward`` made by :meth:`FakeTorch.kernels` when it is called, for
as long as its kernels take; events and the profiler see that time line.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"
CUDA, CPU = "DeviceType.CUDA", "DeviceType.CPU"
BARE_UUID = "01234567-89ab-cdef-0123-456789abcdef"  # torch writes it without "GPU-"


class FakeTorch:
    float32 = "float32"

    def __init__(self, capture: str = "") -> None:
        self.log: list[str] = []
        self.now = 0  # nanoseconds on the GPU
        self.recorded: list[tuple[str, str, int, int]] | None = None
        self.lose: Callable[[str], bool] = lambda name: False  # noqa: ARG005
        self.capture = capture  # why capturing fails; empty: it does not
        self.autograd = SimpleNamespace(
            DeviceType=SimpleNamespace(CUDA=CUDA),
            profiler=SimpleNamespace(profile=lambda **options: _Profiler(self, options)),
        )
        self.cuda = SimpleNamespace(
            get_device_properties=lambda _: SimpleNamespace(
                name="NVIDIA H100 80GB HBM3", uuid=BARE_UUID, L2_cache_size=50
            ),
            synchronize=lambda *_: self.log.append("wait"),
            Event=lambda **options: _Event(self, options),
            _sleep=self._sleep,
            mem_get_info=lambda _: (60, 80),
            empty_cache=lambda: self.log.append("empty cache"),
            is_available=lambda: True,
            set_device=lambda _: None,
            current_device=lambda: 0,
            device=lambda index: _Within(self, f"device {index}"),
            CUDAGraph=lambda: _Graph(self),
            graph=lambda graph: _Capture(self, graph),
        )

    def kernels(self, *named: tuple[str, int]) -> Callable[[], None]:
        """A forward that launches kernels of these names and nanoseconds."""

        def forward() -> None:
            self.log.append("forward")
            for name, duration in named:
                self.launch(name, duration)

        return forward

    def launch(self, name: str, duration: int) -> None:
        if self.recorded is not None and not self.lose(name):
            self.recorded.append(("cudaLaunchKernel", CPU, self.now, 5))
            self.recorded.append((name, CUDA, self.now, duration))
        self.now += duration

    def zeros(self, elements: int, **options: Any) -> Any:
        self.log.append(f"zeros {elements} on {options['device']}")

        def add(_: int) -> None:
            self.launch("add", 10)

        def read() -> None:
            self.log.append("sweep")
            self.launch("reduce_kernel", 40_000)

        return SimpleNamespace(sum=read, add_=add)

    def _sleep(self, cycles: int) -> None:
        self.log.append(f"spin {cycles}")
        self.launch(SPIN, max(1, cycles // 2))


class _Event:
    def __init__(self, torch: FakeTorch, options: dict[str, Any]) -> None:
        self.torch, self.timed = torch, options.get("enable_timing", False)
        self.at = -1
        if self.timed:
            torch.log.append("new event")

    def record(self) -> None:
        self.at = self.torch.now
        self.torch.log.append("event" if self.timed else "mark")

    def synchronize(self) -> None:
        self.torch.log.append("wait for mark")

    def elapsed_time(self, end: _Event) -> float:
        assert self.timed
        assert end.at >= self.at >= 0
        return (end.at - self.at) / 1e6


class _Profiler:
    def __init__(self, torch: FakeTorch, options: dict[str, Any]) -> None:
        assert options == {"use_kineto": True, "use_cpu": False, "use_device": "cuda"}
        self.torch = torch

    def __enter__(self) -> _Profiler:
        self.torch.recorded = []
        self.torch.log.append("profile")
        return self

    def __exit__(self, *_: object) -> None:
        recorded, self.torch.recorded = self.torch.recorded, None
        self.torch.log.append("profiled")
        events = [_kineto(*item) for item in reversed(recorded or [])]  # no order is promised
        self.kineto_results = SimpleNamespace(events=lambda: events)


def _kineto(name: str, where: str, start: int, duration: int) -> Any:
    return SimpleNamespace(
        name=lambda: name,
        device_type=lambda: where,
        start_ns=lambda: start,
        duration_ns=lambda: duration,
    )


class _Within:
    def __init__(self, torch: FakeTorch, name: str) -> None:
        self.torch, self.name = torch, name

    def __enter__(self) -> None:
        self.torch.log.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.torch.log.append(f"leave {self.name}")


class _Graph:
    def __init__(self, torch: FakeTorch) -> None:
        self.torch = torch
        self.forwards = 0

    def replay(self) -> None:
        self.torch.log.append("replay")
        self.torch.launch("captured", 500_000 * self.forwards)


class _Capture:
    """Within it forwards are counted for the graph, and run nothing."""

    def __init__(self, torch: FakeTorch, graph: _Graph) -> None:
        self.torch, self.graph = torch, graph

    def __enter__(self) -> None:
        self.at = len(self.torch.log)

    def __exit__(self, *_: object) -> None:
        self.graph.forwards = self.torch.log[self.at :].count("forward")
        self.torch.log.append(f"captured {self.graph.forwards}")
        if self.torch.capture:
            raise RuntimeError(self.torch.capture)
