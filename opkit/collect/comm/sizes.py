"""What a message size means, collective by collective, and the bandwidths that follow from a time.

The conventions are those of nccl-tests, which measured the field's table (NVIDIA/nccl-tests,
``src/{all_reduce,all_gather,reduce_scatter,alltoall}.cu``, ``*GetCollByteCount`` and ``*GetBw``;
bandwidths explained in its ``doc/PERFORMANCE.md``): the size is that of the *whole* buffer. With n
ranks, all_gather sends a share of 1/n and receives the whole, reduce_scatter sends the whole and
receives a share, alltoall sends and receives the whole in n shares, all_reduce keeps the whole.
A share is rounded down to 16 bytes. The table counts elements of that whole buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

from opkit.errors import WrongUsage

# As the table's op_name writes them; aiconfigurator looks for "alltoall", without underscores.
OPS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall")
ALIASES = {"all_to_all": "alltoall"}
ITEM_BYTES = {"half": 2, "int8": 1, "bfloat16": 2}  # bytes of an element
SHARE_ALIGNMENT = 16  # bytes, nccl-tests


@dataclass(frozen=True)
class Span:
    """Message sizes in bytes: ``first``, ``first · factor``, … up to ``last``."""

    first: int
    last: int
    factor: int = 2

    def sizes(self) -> tuple[int, ...]:
        """The sizes, ascending.

        Raises:
            WrongUsage: the bounds or the factor name no size.
        """
        if self.first < 1 or self.last < self.first:
            raise WrongUsage(
                f"no message size lies between {self.first:,} and {self.last:,} bytes",
                "--min-bytes must be at least 1 and at most --max-bytes",
            )
        if self.factor < 2:
            raise WrongUsage(f"--factor must be at least 2, not {self.factor}")
        made = [self.first]
        while made[-1] * self.factor <= self.last:
            made.append(made[-1] * self.factor)
        return tuple(made)


# The field's collectors: collect_nccl.py, range 512,536870913,2 in bytes; collect_all_reduce.py,
# range 128,1073741824,2 in elements of bfloat16, its end not included.
NCCL_SPAN = Span(512, 512 * 1024**2)
CUSTOM_SPAN = Span(256, 1024**3)


@dataclass(frozen=True)
class Message:
    """One message: elements of the whole buffer, and what one rank sends and receives of it.

    ``total`` is a little below the size that was asked for where that does not divide by the ranks.
    """

    total: int
    sent: int
    received: int


def message(op: str, dtype: str, size: int, ranks: int) -> Message:
    """The message of ``size`` bytes in all between ``ranks`` ranks.

    Raises:
        WrongUsage: it is too small to give every rank a share of 16 bytes, or no whole element.
    """
    item = ITEM_BYTES[dtype]
    if op == "all_reduce":
        total = size // item
        share = total
    else:
        share = size // ranks // SHARE_ALIGNMENT * SHARE_ALIGNMENT // item
        total = share * ranks
    if total == 0:
        raise WrongUsage(
            f"{op} of {size:,} bytes between {ranks} ranks is less than one share of "
            f"{SHARE_ALIGNMENT} bytes each",
            f"--min-bytes must be at least {SHARE_ALIGNMENT * ranks}",
        )
    sent = share if op == "all_gather" else total
    received = share if op == "reduce_scatter" else total
    return Message(total, sent, received)


def algorithm_bandwidth(total_bytes: int, latency_ms: float) -> float:
    """GB/s (1e9 bytes): the whole buffer over the time."""
    return total_bytes / (latency_ms * 1e6)


def bus_factor(op: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth: the share of the buffer that crosses each link."""
    return (2 if op == "all_reduce" else 1) * (ranks - 1) / ranks


def bus_bandwidth(op: str, ranks: int, total_bytes: int, latency_ms: float) -> float:
    """GB/s: comparable with the hardware's peak whatever the number of ranks; 0 for one rank."""
    return algorithm_bandwidth(total_bytes, latency_ms) * bus_factor(op, ranks)
