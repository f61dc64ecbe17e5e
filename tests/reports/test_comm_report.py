"""The report of ``opkit comm``, as it appears: wide, narrow, with failures, with an engine."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from made_rows import measured
from rich.console import Console

from opkit.collect.comm.plan import CommCase, CommOptions
from opkit.collect.comm.run import CommResult, plan_comm
from opkit.collect.tables.validate import Problem, Rule
from opkit.collect.tables.write import TableFiles
from opkit.collect.work import Fault, Row
from opkit.layers.op import LaunchMode
from opkit.reports.comm import print_comm, print_comm_plan, size_text

HOME = Path("out/comm")

WIDE = """
nccl
op          dtype  GPUs     size  launch  latency µs    spread  algorithm GB/s  bus GB/s  flags
────────────────────────────────────────────────────────────────────────────────────────────────────────
all_reduce  half      2    512 B  graph        10.00  ± 0.11 %           0.051     0.051
all_reduce  half      2   64 KiB  eager        20.00  ± 0.11 %           3.277     3.277  eager_fallback
────────────────────────────────────────────────────────────────────────────────────────────────────────
all_reduce  half      4  512 MiB  graph     2,000.00  ± 0.11 %         268.435   402.653  throttled
────────────────────────────────────────────────────────────────────────────────────────────────────────
all_gather  int8      4    1 KiB  graph            –         –               –         –  worker died

note: 3 earlier nccl rows are kept
not written: nccl: latency is below its bound
2 rows of nccl flagged spike, as: 512 B lies 40 % off
quarantined: nccl all_gather int8, 4 ranks, 1 KiB: worker died: rank 1 was ended by SIGKILL
  what the ranks printed is in out/comm/logs
nccl  3 rows  partial  out/comm/nccl/2.29.2
4 cases, 1 of them measured before; 65 s
next: run the same command again: it measures only what is missing or has failed
"""  # noqa: E501


def row(
    op: str = "all_reduce",
    size: int = 512,
    us: float | None = 10.0,
    *,
    ranks: int = 2,
    name: str = "nccl",
    dtype: str = "half",
    launch: LaunchMode = LaunchMode.GRAPH,
    served_by: str | None = None,
    **changed: object,
) -> Row:
    """A row of a collective, with a value or without."""
    case = CommCase(name, op, dtype, ranks, size, launch)
    answer = None if us is None else measured(us / 1e3, launch=launch, **changed)
    told = {**asdict(case), "total_bytes": case.total_bytes, "served_by": served_by or name}
    failed = {} if answer else {"fault": Fault.CRASH, "error": "rank 1 was ended by SIGKILL"}
    return Row("k", "g", "nccl", {}, told, answer, **failed)  # type: ignore[arg-type]


def files(name: str = "nccl", folder: str = "nccl/2.29.2", status: str = "complete") -> TableFiles:
    place = Path("out/comm") / folder
    stem = f"{name}_perf"
    return TableFiles(
        name, 3, status, place / f"{stem}.txt", place / f"{stem}.parquet",
        place / f"{stem}.provenance.json",
    )  # fmt: skip


def result(*rows: Row, tables: tuple[TableFiles, ...] = ()) -> CommResult:
    return CommResult(rows, tables, (), (), HOME, resumed=1, seconds=65.0)


def printed(found: CommResult, width: int = 130) -> str:
    screen = io.StringIO()
    print_comm(found, Console(file=screen, width=width, color_system=None))
    return "\n".join(line.rstrip() for line in screen.getvalue().split("\n"))


def test_a_whole_report() -> None:
    found = replace(
        result(
            row(),
            row(size=65536, us=20.0, launch=LaunchMode.EAGER, graph_error="refused"),
            row(size=512 << 20, us=2000.0, ranks=4, throttled=True),
            row("all_gather", 1024, None, ranks=4, dtype="int8"),
            tables=(files(status="partial"),),
        ),
        notes=("3 earlier nccl rows are kept",),
        problems=(
            Problem("nccl", Rule.BOUND, "latency is below its bound", True, "k", {}),
            Problem("nccl", Rule.SPIKE, "512 B lies 40 % off", False, "k", {}),
            Problem("nccl", Rule.SPIKE, "1 KiB lies 30 % off", False, "k", {}),
        ),
    )
    assert printed(found) == WIDE.removeprefix("\n")


@pytest.mark.parametrize("width", [60, 80, 100, 130])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    rows = [row(op, size) for op in ("all_reduce", "reduce_scatter") for size in (512, 1 << 29)]
    table = printed(result(*rows, tables=(files(),)), width).split("\n\n")[0]
    assert max(map(len, table.split("\n"))) <= width
    assert "…" not in table
    assert table.count(" 10.00") == 4


def test_at_80_columns_bus_bandwidth_and_spread_stay() -> None:
    found = result(row("reduce_scatter", us=20.0, throttled=True), tables=(files(),))
    heading = printed(found, 80).split("\n")[1]
    assert heading.split() == (
        ["op", "dtype", "GPUs", "size", "latency", "µs", "spread", "bus", "GB/s", "flags"]
    )


def test_an_engine_tells_who_answered_and_eager_rows_never_look_like_graphs() -> None:
    found = result(
        row(name="vllm", dtype="bfloat16", served_by="custom"),
        row(name="vllm", dtype="bfloat16", served_by="nccl", launch=LaunchMode.EAGER),
        tables=(files("custom_allreduce", "vllm/0.24.0"),),
    )
    for width in (60, 130):
        lines = printed(found, width).split("\n")
        assert "graph" in lines[3]
        assert "eager" in lines[5]
    assert lines[3].endswith("custom")
    assert lines[5].endswith("nccl")
    assert lines[-2].startswith("next: aiconfigurator reads comm/vllm/0.24.0 below")


def test_implementations_have_tables_of_their_own() -> None:
    shown = printed(result(row(), row(name="vllm", dtype="bfloat16"), tables=(files(),)))
    assert [line for line in shown.split("\n") if line in ("nccl", "vllm")] == ["nccl", "vllm"]
    assert shown.count("latency µs") == 2


def test_one_error_of_many_cases_is_told_once() -> None:
    rows = [row("alltoall", 1024 << power, None) for power in range(21)]
    shown = printed(result(*rows))
    assert shown.count("quarantined") == 1
    assert "quarantined: nccl alltoall half, 2 ranks, 1 KiB and 20 more: worker died" in shown


@pytest.mark.parametrize(
    ("found", "step"),
    [
        (result(row(), tables=(files(),)), "aiconfigurator reads comm/nccl/2.29.2 below"),
        (result(row(ranks=1)), "the same between two GPUs or more"),
        (result(row(name="gloo"), tables=(files("gloo", "gloo/2.13"),)), "the same on GPUs"),
        (result(row(us=None), tables=(files(),)), "run the same command again"),
        (
            replace(
                result(row(), tables=(files(),)),
                problems=(Problem("nccl", Rule.VALUE, "x", True, "k", {}),),
            ),
            "see what was not written",
        ),
    ],
)
def test_the_next_step(found: CommResult, step: str) -> None:
    assert printed(found).split("\n")[-2].startswith(f"next: {step}")


def test_one_gpu_has_no_bus() -> None:
    line = printed(result(row(ranks=1))).split("\n")[3]
    assert line.split()[-2:] == ["0.051", "–"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 B"), (1023, "1,023 B"), (1024, "1 KiB"), (1536, "1,536 B"), (1 << 20, "1 MiB"),
        (1_048_560, "1,048,560 B"), (512 << 20, "512 MiB"), (1 << 30, "1 GiB"),
    ],
)  # fmt: skip
def test_sizes_are_exact(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize("width", [80, 130])
def test_the_plan(width: int) -> None:
    options = CommOptions(out=Path("out"), gpus=(2, 3), device="cpu", max_bytes=2048)
    screen = io.StringIO()
    console = Console(file=screen, width=width, color_system=None)
    print_comm_plan(plan_comm(options), console)
    lines = [line.rstrip() for line in screen.getvalue().split("\n")]
    assert lines[2].startswith("gloo          2  all_reduce, all_gath")
    assert lines[3].startswith("gloo          3  ")
    assert lines[3].endswith("512 B to 2 KiB     24")
    assert lines[4].startswith("48 cases in 2 sets of ranks, roughly ")
    assert max(map(len, lines)) <= width
