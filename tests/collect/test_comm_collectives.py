"""The check of results, against collectives computed by hand. Needs torch; no GPU, no processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from opkit.collect.comm import collectives
from opkit.collect.comm.collectives import (
    EngineAllReduce,
    WrongResult,
    check,
    fill_for_check,
    fill_for_timing,
    largest_value,
    values,
)
from opkit.collect.comm.plan import CommCase
from opkit.collect.comm.sizes import OPS
from opkit.layers.op import LaunchMode

torch: Any = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

SEED = 3


@dataclass
class Buffers:
    """A collective whose results are put there by the test."""

    source: Any
    results: list[Any] = field(default_factory=list)

    def refill(self) -> None:
        pass

    def launch(self) -> None:
        pass

    def received(self) -> list[Any]:
        return self.results


def case_of(op: str, dtype: str = "half", ranks: int = 3, size: int = 480) -> CommCase:
    return CommCase("nccl", op, dtype, ranks, size, LaunchMode.GRAPH)


def by_hand(case: CommCase) -> list[Buffers]:
    """All ranks with their data and the right results, computed rank by rank."""
    made = case.message()
    dtype = getattr(torch, collectives.TORCH_DTYPES[case.dtype])
    ranks = []
    for rank in range(case.ranks):
        one = Buffers(torch.empty(made.sent, dtype=dtype))
        fill_for_check(torch, one, case, rank, SEED)
        ranks.append(one)
    sent = [one.source for one in ranks]
    total = torch.stack([part.to(torch.int64) for part in sent]).sum(0).to(dtype)
    share = made.total // case.ranks
    for rank, one in enumerate(ranks):
        here = slice(rank * share, (rank + 1) * share)
        one.results = [
            {
                "all_reduce": lambda: total,
                "all_gather": lambda: torch.cat(sent),
                "reduce_scatter": lambda here=here: total[here],
                "alltoall": lambda here=here: torch.cat([part[here] for part in sent]),
            }[case.op]().clone()
        ]
    return ranks


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["half", "int8", "bfloat16"])
def test_right_results_pass_at_every_rank(op: str, dtype: str) -> None:
    case = case_of(op, dtype)
    for rank, buffers in enumerate(by_hand(case)):
        check(torch, buffers, case, rank, SEED)


@pytest.mark.parametrize("op", OPS)
def test_a_single_wrong_element_is_found(op: str) -> None:
    case = case_of(op)
    buffers = by_hand(case)[1]
    buffers.results[0][7] += 1
    with pytest.raises(WrongResult, match=r"1 of .* elements are wrong; element 7 is"):
        check(torch, buffers, case, 1, SEED)


@pytest.mark.parametrize("op", OPS)
def test_another_ranks_result_is_found(op: str) -> None:
    case = case_of(op)
    ranks = by_hand(case)
    if op in ("all_reduce", "all_gather"):  # the same at all ranks: shifted by one share instead
        ranks[0].results[0] = ranks[0].results[0].roll(case.message().total // case.ranks)
    else:
        ranks[0].results = ranks[1].results
    with pytest.raises(WrongResult):
        check(torch, ranks[0], case, 0, SEED)


def test_a_reduction_that_leaves_out_a_rank_is_found() -> None:
    case = case_of("all_reduce")
    ranks = by_hand(case)
    ranks[0].results[0] -= ranks[2].source
    with pytest.raises(WrongResult):
        check(torch, ranks[0], case, 0, SEED)


def test_every_launch_of_a_batch_is_checked() -> None:
    case = case_of("all_reduce")
    buffers = by_hand(case)[0]
    buffers.results = [buffers.results[0], torch.zeros_like(buffers.results[0])]
    with pytest.raises(WrongResult, match="launch 1"):
        check(torch, buffers, case, 0, SEED)


def test_a_result_is_checked_beyond_the_first_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "CHUNK", 50)
    case = case_of("alltoall")
    buffers = by_hand(case)[2]
    check(torch, buffers, case, 2, SEED)
    buffers.results[0][-1] += 1
    with pytest.raises(WrongResult, match="element 239"):
        check(torch, buffers, case, 2, SEED)


@pytest.mark.parametrize("dtype", ["half", "int8", "bfloat16"])
@pytest.mark.parametrize("ranks", [1, 2, 8, 72])
def test_sums_are_exact_in_their_type(dtype: str, ranks: int) -> None:
    largest = largest_value(dtype, ranks)
    assert 1 <= largest <= 8
    total = largest * ranks
    kind = getattr(torch, collectives.TORCH_DTYPES[dtype])
    assert int(torch.tensor(total, dtype=torch.int64).to(kind)) == total


def test_checked_data_differs_from_rank_to_rank_and_place_to_place() -> None:
    at = torch.arange(4096)
    first, second = (values(at, rank, 8, SEED) for rank in (0, 1))
    assert set(first.tolist()) == set(range(-8, 9))
    assert (first == second).float().mean() < 0.2
    assert (first[:-1] == first[1:]).float().mean() < 0.2


def test_timed_data_is_not_degenerate() -> None:
    for dtype in (torch.float16, torch.int8):
        one, two = (Buffers(torch.zeros(4096, dtype=dtype)) for _ in range(2))
        fill_for_timing(torch, one, 0, SEED)
        fill_for_timing(torch, two, 1, SEED)
        assert len(one.source.unique()) > 200
        assert not torch.equal(one.source, two.source)


@pytest.mark.parametrize(
    ("size", "shape"), [(256, (1, 128)), (8192, (1, 4096)), (32768, (4, 4096)), (8200, (1, 4100))]
)
def test_an_engine_gets_activations(size: int, shape: tuple[int, int]) -> None:
    case = CommCase("vllm", "all_reduce", "bfloat16", 2, size, LaunchMode.EAGER)
    arena = torch.empty(65536, dtype=torch.uint8)
    seen = []

    def reduce(given: Any) -> Any:
        seen.append(tuple(given.shape))
        return given * 2

    made = EngineAllReduce(torch, case, arena, reduce)
    made.source.fill_(1)
    made.launch()
    assert set(seen) == {shape}
    assert len(made.received()) == len(seen) == 20
    assert all(float(result.min()) == 2 for result in made.received())
