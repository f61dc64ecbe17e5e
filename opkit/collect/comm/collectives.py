"""One collective between ranks: its data, its launches, and whether the result is right.

Nothing here imports torch when loaded; functions take the module as an argument. Data that is
checked is made from positions by integer arithmetic, so that every rank can say what the others
sent without a message and without a random generator that differs between devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from opkit.collect.comm.plan import CommCase, launches

# Names of torch's element types.
TORCH_DTYPES = {"half": "float16", "int8": "int8", "bfloat16": "bfloat16"}
CHUNK = 1 << 24  # elements checked at a time: bounds the check's own memory
# Largest sums that each type holds exactly: float16 has 11 significant bits, bfloat16 8, int8 7.
EXACT = {"half": 2048, "bfloat16": 256, "int8": 127}
LARGEST_VALUE = 8
MULTIPLIER, RANK_STEP, SHIFT = 2654435761, 1013904223, 11  # odd constants that mix the bits


class WrongResult(Exception):
    """A collective did not compute what it should have."""


class Collective(Protocol):
    """Buffers and launches of one case at one rank."""

    source: Any  # what this rank sends: tensor of ``message().sent`` elements

    def refill(self) -> None:
        """Make the next batch possible: an all-reduce in place has overwritten what it sent."""

    def launch(self) -> None:
        """Launch one batch on the current stream."""

    def received(self) -> list[Any]:
        """The tensors that the last batch has filled, in the order of its launches."""


class TorchCollective:
    """A collective of ``torch.distributed``: NCCL's on GPUs, gloo's on a CPU.

    all_reduce works in place, as ``torch.distributed`` has it: each launch of a batch gets a buffer
    of its own, and all are filled again before the next. Else the values would double with each
    launch until they overflow, and the measured data would be degenerate. The other collectives
    read one buffer and write another, over and over.
    """

    def __init__(self, torch: Any, case: CommCase, device: Any) -> None:
        self._torch = torch
        self._dist = torch.distributed
        self._op = case.op
        # torch 2.13 renames two of them.
        names = {
            "all_reduce": ("all_reduce",),
            "all_gather": ("all_gather_single", "all_gather_into_tensor"),
            "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
            "alltoall": ("all_to_all_single",),
        }[case.op]
        name = next(name for name in names if hasattr(self._dist, name))
        self._run: Callable[..., Any] = getattr(self._dist, name)
        self._count = launches(case)
        made = case.message()
        dtype = getattr(torch, TORCH_DTYPES[case.dtype])
        self.source = torch.empty(made.sent, dtype=dtype, device=device)
        slots = self._count if case.op == "all_reduce" else 1
        self._slots = [torch.empty(made.received, dtype=dtype, device=device) for _ in range(slots)]

    def refill(self) -> None:
        if self._op == "all_reduce":
            for slot in self._slots:
                slot.copy_(self.source)

    def launch(self) -> None:
        if self._op == "all_reduce":
            for slot in self._slots:
                self._run(slot)
            return
        for _ in range(self._count):
            self._run(self._slots[0], self.source)

    def received(self) -> list[Any]:
        return self._slots


class EngineAllReduce:
    """An engine's own all-reduce, out of place: ``reduce`` takes a tensor and returns the sum.

    The tensor has the shape of activations, [tokens, width]: some kernels ask for two dimensions.
    It lies in ``arena`` (bytes), which outlives the case: ranks keep each other's buffers mapped.
    """

    WIDTH = 4096  # as the field's collector shapes it

    def __init__(
        self, torch: Any, case: CommCase, arena: Any, reduce: Callable[[Any], Any]
    ) -> None:
        total = case.message().total
        dtype = getattr(torch, TORCH_DTYPES[case.dtype])
        self.source = arena[: case.total_bytes].view(dtype)
        even = total > self.WIDTH and total % self.WIDTH == 0
        self.shaped = self.source.view(-1, self.WIDTH) if even else self.source.view(1, -1)
        self._reduce = reduce
        self._count = launches(case)
        self._outputs: list[Any] = []

    def refill(self) -> None:
        """Nothing: the source is only read."""

    def launch(self) -> None:
        self._outputs = [self._reduce(self.shaped) for _ in range(self._count)]

    def received(self) -> list[Any]:
        return [output.view(-1) for output in self._outputs]


def largest_value(dtype: str, ranks: int) -> int:
    """Checked values lie in ± this, so that the sum over all ranks is exact in ``dtype``."""
    return max(1, min(LARGEST_VALUE, EXACT[dtype] // ranks))


def values(positions: Any, rank: Any, largest: int, seed: int) -> Any:
    """Integers in ± ``largest`` that ``rank`` holds at ``positions`` (int64 tensors, same shape).

    int64 holds the products: positions stay below 2^31.
    """
    mixed = (positions + 1) * MULTIPLIER + (rank + seed + 1) * RANK_STEP
    return (mixed >> SHIFT) % (2 * largest + 1) - largest


def fill_for_check(
    torch: Any, collective: Collective, case: CommCase, rank: int, seed: int
) -> None:
    """Give this rank the data whose result is known."""
    source = collective.source
    largest = largest_value(case.dtype, case.ranks)
    for begin in range(0, source.numel(), CHUNK):
        end = min(begin + CHUNK, source.numel())
        at = torch.arange(begin, end, dtype=torch.int64, device=source.device)
        source[begin:end] = values(at, rank, largest, seed).to(source.dtype)
    collective.refill()


def spoil(torch: Any, collective: Collective) -> None:
    """Overwrite what the last batch received with what no check expects.

    Else a batch that does nothing, as the replay of an empty graph, would be taken for right: the
    buffers still hold what an earlier one has put there.
    """
    for result in collective.received():
        result.fill_(-128 if result.dtype == torch.int8 else math.nan)


def fill_for_timing(torch: Any, collective: Collective, rank: int, seed: int) -> None:
    """Random data: normal, or all of int8's values; degenerate operands draw less power."""
    source = collective.source
    torch.manual_seed(seed * 1000 + rank)
    if source.dtype == torch.int8:
        source.random_(-128, 128)
    else:
        source.normal_()
    collective.refill()


def expected(torch: Any, case: CommCase, rank: int, at: Any, seed: int) -> Any:
    """What ``rank`` must have received at the positions ``at`` (int64), as int64."""
    ranks = case.ranks
    made = case.message()
    largest = largest_value(case.dtype, ranks)
    if case.op == "all_gather":
        return values(at % made.sent, at // made.sent, largest, seed)
    if case.op == "alltoall":
        share = made.total // ranks
        return values(rank * share + at % share, at // share, largest, seed)
    sent_at = at + rank * made.received if case.op == "reduce_scatter" else at
    total = torch.zeros_like(at)
    for other in range(ranks):
        total += values(sent_at, other, largest, seed)
    return total


def check(torch: Any, collective: Collective, case: CommCase, rank: int, seed: int) -> None:
    """Compare every element that every launch of the last batch received, exactly.

    Raises:
        WrongResult: with the number of wrong elements and the first of them.
    """
    results = collective.received()
    for begin in range(0, results[0].numel(), CHUNK):
        end = min(begin + CHUNK, results[0].numel())
        at = torch.arange(begin, end, dtype=torch.int64, device=results[0].device)
        want = expected(torch, case, rank, at, seed).to(results[0].dtype)
        for number, result in enumerate(results):
            wrong = (result[begin:end] != want).nonzero()
            if wrong.numel():
                first = int(wrong[0])
                raise WrongResult(
                    f"rank {rank}, launch {number}: {wrong.numel():,} of {end - begin:,} elements "
                    f"are wrong; element {begin + first:,} is {float(result[begin + first]):g}, "
                    f"not {float(want[first]):g}"
                )
