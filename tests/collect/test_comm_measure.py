"""How ranks agree while they time: graphs, fallbacks, the slowest rank, when to stop. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest

from opkit.collect.comm import measure as measuring
from opkit.collect.comm.collectives import WrongResult
from opkit.collect.comm.measure import LEAD_SECONDS, Party, measure
from opkit.collect.comm.plan import CommCase
from opkit.collect.measurement import Timing, measurement_from_json
from opkit.layers.op import LaunchMode
from opkit.sensors.nvml import Gpu
from opkit.sensors.state import GpuState

TIMING = Timing(warmups=2, min_iterations=20, max_iterations=60, spread=0.01, max_seconds=30.0)


class Store:
    """A ``torch.distributed`` store within one process."""

    def __init__(self) -> None:
        self.held: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.held[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.held, timeout=20)
            return self.held[key]

    def delete_key(self, key: str) -> None:
        with self._changed:
            del self.held[key]


@dataclass
class FakeCuda:
    """``torch.cuda`` of one rank: what was launched, and how long batches take."""

    times: Iterator[float]
    refuses: bool = False
    log: list[str] = field(default_factory=list)

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                cuda.log.append("event")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, _other: Any) -> float:
                return next(cuda.times)

        return Event()

    def CUDAGraph(self) -> Any:
        cuda = self

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")

        return Graph()

    @contextmanager
    def graph(self, _graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (stream, capture_error_mode) == (None, "thread_local")
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        self.log.append(f"sleep {cycles / 2e9 * 1e6:.0f} us")


class FakeTorch:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.distributed = self

    def zeros(self, *_: Any, **__: Any) -> str:
        return "token"

    def all_reduce(self, token: str) -> None:
        self.cuda.log.append(token)


@dataclass
class Device:
    type: str = "cuda"


class Launches:
    """A collective that only notes what is done with it."""

    source = None

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def refill(self) -> None:
        self._log.append("refill")

    def launch(self) -> None:
        self._log.append("launch")

    def received(self) -> list[Any]:
        return []


class Plain:
    """A backend of such collectives."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def collective(self, _case: CommCase) -> Any:
        return Launches(self._log)

    def capturing(self) -> Any:
        return nullcontext()

    def served_by(self, _collective: Any) -> str:
        return "fake"


class Sensors(Gpu):
    """A GPU whose clock is lowered, or not."""

    def __init__(self, *reasons: str) -> None:
        super().__init__()
        self._reasons_given = reasons

    def state(self) -> GpuState:
        return GpuState(sm_mhz=1980, throttle=self._reasons_given)


def case(launch: LaunchMode = LaunchMode.GRAPH) -> CommCase:
    return CommCase("nccl", "all_reduce", "half", 2, 512, launch)  # 20 launches a batch


def steady(value: float) -> Callable[[], Iterator[float]]:
    """Batches that all take ``value`` milliseconds."""

    def times() -> Iterator[float]:
        while True:
            yield value

    return times


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and its check need torch; ``test_comm_collectives`` has them."""
    for name in ("fill_for_check", "fill_for_timing", "check"):
        monkeypatch.setattr(measuring, name, lambda *_: None)


def together(
    cudas: list[FakeCuda],
    what: CommCase | None = None,
    timing: Timing = TIMING,
    gpus: tuple[Gpu, ...] = (),
) -> list[dict[str, Any]]:
    """All ranks measure a case; their answers by rank."""
    store = Store()

    def one(rank: int) -> dict[str, Any]:
        cuda = cudas[rank]
        gpu = gpus[rank] if gpus else Gpu()
        party = Party(FakeTorch(cuda), store, Device(), gpu, rank, len(cudas))
        return measure(party, Plain(cuda.log), what or case(), timing, 0)

    with ThreadPoolExecutor(len(cudas)) as pool:
        return list(pool.map(one, range(len(cudas))))


def measured(answer: dict[str, Any]) -> Any:
    return measurement_from_json(
        {**answer["measurement"], "launch": str(answer["measurement"]["launch"])}, "here"
    )


def test_the_slowest_rank_counts_and_all_ranks_say_the_same() -> None:
    answers = together([FakeCuda(steady(2.0)()), FakeCuda(steady(4.0)())])
    assert answers[0] == answers[1]
    found = measured(answers[0])
    assert set(found.elapsed_ms) == {0.2}  # 4 ms for 20 launches
    assert answers[0]["rank_ms"] == [0.1, 0.2]
    assert (found.launch, found.stopped, len(found.elapsed_ms)) == (LaunchMode.GRAPH, "spread", 20)


def test_the_slowest_of_each_batch_counts_not_the_slowest_on_the_whole() -> None:
    def alternating(first: float, second: float) -> Iterator[float]:
        while True:
            yield first
            yield second

    answers = together([FakeCuda(alternating(2.0, 4.0)), FakeCuda(alternating(4.0, 2.0))])
    assert set(measured(answers[0]).elapsed_ms) == {0.2}
    assert answers[0]["rank_ms"] == pytest.approx([0.15, 0.15])


def test_a_batch_is_aligned_on_the_gpu_before_its_events() -> None:
    cudas = [FakeCuda(steady(2.0)()), FakeCuda(steady(2.0)())]
    together(cudas)
    lead = f"sleep {LEAD_SECONDS * 1e6:.0f} us"
    assert cudas[0].log[-6:] == ["refill", lead, "token", "event", "replay", "event"]


def test_one_rank_that_cannot_capture_makes_all_launch_eagerly() -> None:
    cudas = [FakeCuda(steady(2.0)()), FakeCuda(steady(2.0)(), refuses=True)]
    answers = together(cudas)
    assert answers[0] == answers[1]
    found = measured(answers[0])
    assert found.launch is LaunchMode.EAGER
    assert found.graph_error.startswith("rank 1: RuntimeError: operation not permitted")
    assert all("replay" not in cuda.log for cuda in cudas)
    # The host's launches are hidden: 200 µs and 50 µs for each of 20.
    assert cudas[0].log[-6:] == ["refill", "sleep 1200 us", "token", "event", "launch", "event"]


def test_an_eager_case_is_timed_with_its_launches() -> None:
    cudas = [FakeCuda(steady(2.0)()), FakeCuda(steady(2.0)())]
    answers = together(cudas, case(LaunchMode.EAGER))
    found = measured(answers[0])
    assert (found.launch, found.graph_error) == (LaunchMode.EAGER, "")
    assert cudas[0].log[-5:] == ["refill", "token", "event", "launch", "event"]


def test_samples_go_on_until_their_number_or_the_time_is_up() -> None:
    def scattered() -> Iterator[float]:
        number = 0
        while True:
            number += 1
            yield 1.0 + number % 7

    many = measured(together([FakeCuda(scattered())])[0])
    assert (many.stopped, len(many.elapsed_ms)) == ("iterations", 60)
    hurried = Timing(**{**vars(TIMING), "max_seconds": 0.0})
    few = measured(together([FakeCuda(scattered())], timing=hurried)[0])
    assert (few.stopped, len(few.elapsed_ms)) == ("time", 20)


def test_any_ranks_lowered_clock_marks_the_row() -> None:
    def cudas() -> list[FakeCuda]:
        return [FakeCuda(steady(2.0)()), FakeCuda(steady(2.0)())]

    calm, hot = Sensors("GpuIdle"), Sensors("SwPowerCap")
    assert not measured(together(cudas(), gpus=(calm, calm))[0]).throttled
    answers = together(cudas(), gpus=(calm, hot))
    assert measured(answers[0]).throttled
    assert measured(answers[0]).after.sm_mhz == 1980


def test_a_wrong_result_at_one_rank_is_told_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(_torch: Any, _collective: Any, _case: CommCase, rank: int, _seed: int) -> None:
        if rank == 1:
            raise WrongResult("rank 1, launch 0: 3 of 256 elements are wrong")

    monkeypatch.setattr(measuring, "check", check)
    cudas = [FakeCuda(steady(2.0)()), FakeCuda(steady(2.0)())]
    store = Store()
    told = []

    def one(rank: int) -> None:
        party = Party(FakeTorch(cudas[rank]), store, Device(), Gpu(), rank, 2)
        with pytest.raises(WrongResult, match="3 of 256") as caught:
            measure(party, Plain(cudas[rank].log), case(), TIMING, 0)
        told.append(str(caught.value))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
    assert len(told) == 2
    assert all("event" not in cuda.log for cuda in cudas)  # nothing was timed


def test_talk_leaves_little_behind() -> None:
    store = Store()

    def one(rank: int) -> None:
        party = Party(FakeTorch(FakeCuda(steady(1.0)())), store, Device(), Gpu(), rank, 3)
        for turn in range(50):
            assert party.exchange([rank, turn]) == [[other, turn] for other in range(3)]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    assert len(store.held) == 3
