"""Message sizes and bandwidths, against nccl-tests' definitions and the shipped tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opkit.collect.comm.sizes import (
    CUSTOM_SPAN,
    ITEM_BYTES,
    NCCL_SPAN,
    OPS,
    Span,
    algorithm_bandwidth,
    bus_bandwidth,
    message,
)
from opkit.errors import WrongUsage


def test_the_default_sizes_are_those_of_the_shipped_nccl_table() -> None:
    # h100_sxm/comm/nccl/2.29.2 of aiconfigurator 0.12.0: 21 sizes, in elements.
    sizes = NCCL_SPAN.sizes()
    for dtype, first, last in (("half", 256, 268435456), ("int8", 512, 536870912)):
        for op in OPS:
            totals = [message(op, dtype, size, 8).total for size in sizes]
            assert (len(totals), totals[0], totals[-1]) == (21, first, last)


def test_the_default_custom_sizes_are_those_of_the_shipped_table() -> None:
    # h100_sxm/comm/vllm/0.24.0: 23 sizes of bfloat16, 128 to 536,870,912 elements.
    totals = [message("all_reduce", "bfloat16", size, 4).total for size in CUSTOM_SPAN.sizes()]
    assert totals == [128 << power for power in range(23)]


def test_the_size_is_that_of_the_whole_buffer() -> None:
    gathered = message("all_gather", "half", 4096, 4)
    assert (gathered.total, gathered.sent, gathered.received) == (2048, 512, 2048)
    scattered = message("reduce_scatter", "half", 4096, 4)
    assert (scattered.total, scattered.sent, scattered.received) == (2048, 2048, 512)
    for op in ("all_reduce", "alltoall"):
        both = message(op, "half", 4096, 4)
        assert (both.total, both.sent, both.received) == (2048, 2048, 2048)


def test_a_share_is_rounded_down_to_16_bytes() -> None:
    # nccl-tests: (count / nranks) & -(16 / eltSize) = 42 & -8 = 40 elements of half.
    assert message("alltoall", "half", 512, 6).total == 240
    assert message("all_reduce", "half", 512, 6).total == 256  # has no shares


@given(
    op=st.sampled_from(OPS),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    size=st.integers(1, 1 << 31),
    ranks=st.integers(1, 72),
)
def test_a_message_never_exceeds_what_was_asked(op: str, dtype: str, size: int, ranks: int) -> None:
    try:
        made = message(op, dtype, size, ranks)
    except WrongUsage:
        assert size < 16 * ranks
        return
    held = made.total * ITEM_BYTES[dtype]
    assert size - 16 * ranks < held <= size
    if op != "all_reduce":
        assert made.total % ranks == 0
    assert {made.sent, made.received} <= {made.total, made.total // ranks}


@pytest.mark.parametrize(
    ("span", "sizes"),
    [
        (Span(512, 4096), (512, 1024, 2048, 4096)),
        (Span(3, 100, 5), (3, 15, 75)),
        (Span(8, 8), (8,)),
    ],
)
def test_sizes_go_up_by_the_factor_and_not_beyond_the_last(
    span: Span, sizes: tuple[int, ...]
) -> None:
    assert span.sizes() == sizes


@pytest.mark.parametrize("span", [Span(0, 10), Span(20, 10), Span(1, 10, 1)])
def test_sizes_that_cannot_be_are_refused(span: Span) -> None:
    with pytest.raises(WrongUsage):
        span.sizes()


def test_too_small_a_message_names_the_least() -> None:
    with pytest.raises(WrongUsage) as caught:
        message("alltoall", "int8", 100, 8)
    assert caught.value.hint == "--min-bytes must be at least 128"


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.75), ("all_gather", 0.875), ("reduce_scatter", 0.875), ("alltoall", 0.875)],
)
def test_bandwidths_follow_nccl_tests(op: str, factor: float) -> None:
    # The shipped H100 row: 512 MiB between 8 GPUs; 1 GB/s is 1e9 bytes a second.
    assert algorithm_bandwidth(536870912, 2.0) == pytest.approx(268.435456)
    assert bus_bandwidth(op, 8, 536870912, 2.0) == pytest.approx(268.435456 * factor)
    assert bus_bandwidth(op, 1, 536870912, 2.0) == 0
