"""``log_perf`` as users of the field's collector call it: one file, whoever wrote and died."""

from __future__ import annotations

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from opkit.collect import log_perf as module
from opkit.collect.log_perf import log_perf, merge_perf
from opkit.errors import BadInput

HEADER = "framework,version,device,op_name,kernel_source,gemm_dtype,m,n,k,latency"


def item(m: int, latency: object = 0.5) -> dict[str, Any]:
    return {"gemm_dtype": "bfloat16", "m": m, "n": 64, "k": 64, "latency": latency}


def log(path: Path, *items: dict[str, Any], power: dict[str, Any] | None = None) -> bool:
    return log_perf(
        list(items), "TRTLLM", "1.3.0rc23", "NVIDIA H200", "gemm", "torch_flow", str(path), power
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def part(path: Path) -> Path:
    (found,) = path.parent.glob(f"{path.name}.*.part")
    return found


def foreign(path: Path, name: str, *lines: str, end: str = "\r\n") -> None:
    """A part that another process left."""
    text = "".join(f"{line}\r\n" for line in (HEADER, *lines[:-1]))
    path.with_name(f"{path.name}.{name}.part").write_bytes((text + lines[-1] + end).encode())


def line(m: int, latency: float = 0.5) -> str:
    return f"TRTLLM,1.3.0rc23,NVIDIA H200,gemm,torch_flow,bfloat16,{m},64,64,{latency}"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = "import os, signal, sys\nfrom opkit.collect.log_perf import log_perf\n"
    script += textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


ONE = """
def one(m, path=sys.argv[1]):
    log_perf([{"gemm_dtype": "bfloat16", "m": m, "n": 64, "k": 64, "latency": 0.5}],
             "TRTLLM", "1.3.0rc23", "NVIDIA H200", "gemm", "torch_flow", path)
"""


# --- one process ---


def test_the_csv_is_the_field_s(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    assert log(path, item(1), item(2, 0.75)) is True
    assert log(path, item(4)) is True
    merged = merge_perf(path)
    assert (merged.rows, merged.parts, merged.torn, merged.duplicates) == (3, 1, 0, 0)
    assert path.read_bytes().decode().split("\r\n") == [
        HEADER, line(1), line(2, 0.75), line(4), "",
    ]  # fmt: skip


def test_power_joins_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    log(path, item(1), power={"power": 400.5, "power_limit": 700})
    log(path, item(2), power={"power": 390.0})
    merge_perf(path)
    found = [(row["power"], row["power_limit"]) for row in rows(path)]
    assert found == [("400.5", "700"), ("390.0", "")]


def test_text_with_commas_and_none_come_back(tmp_path: Path) -> None:
    path = tmp_path / "moe_perf.txt"
    log(path, {"distribution": "power, law", "note": None, "latency": 1.5})
    merge_perf(path)
    (row,) = rows(path)
    assert (row["distribution"], row["note"], row["latency"]) == ("power, law", "", "1.5")


def test_nothing_to_log_is_no_error_and_no_file(tmp_path: Path) -> None:
    assert log(tmp_path / "gemm_perf.txt") is True
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match="nothing was logged"):
        merge_perf(tmp_path / "gemm_perf.txt")


def test_rows_with_other_columns_are_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    log(path, item(1))
    before = part(path).read_bytes()
    with pytest.raises(BadInput, match="other columns"):
        log(path, item(2), {"m": 3, "latency": 1.0})
    with pytest.raises(BadInput, match="were logged before"):
        log(path, item(2), power={"power": 1.0, "power_limit": 2.0})
    with pytest.raises(BadInput, match="more than one line"):
        log(path, {**item(2), "gemm_dtype": "a\nb"})
    assert part(path).read_bytes() == before


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gemm_perf.txt"
    log(path, item(1))
    before = part(path).read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[: len(data) // 2]))
    with pytest.raises(BadInput, match="No space left on device"):
        log(path, item(2))
    monkeypatch.undo()
    assert part(path).read_bytes() == before
    log(path, item(3))
    assert (merge_perf(path).rows, merge_perf(path).torn) == (2, 0)


# --- merging ---


def test_parts_and_what_the_file_held_are_one(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    path.write_bytes(f"{HEADER}\r\n{line(1)}\r\n".encode())  # of the old collector
    foreign(path, "node1-11", line(2), line(3))
    foreign(path, "node2-11.0a1b2c3d", line(4))
    (tmp_path / "gemm_perf.txt.lock").write_text("")
    (tmp_path / "other_perf.txt.node1-11.part").write_text("something else")
    merged = merge_perf(path)
    assert (merged.rows, merged.parts) == (4, 2)
    assert [row["m"] for row in rows(path)] == ["1", "2", "3", "4"]


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    foreign(path, "node1-11", line(1), line(2))
    first = merge_perf(path)
    content = path.read_bytes()
    again = merge_perf(path)
    assert (first.rows, again.rows, again.duplicates) == (2, 2, 0)
    assert path.read_bytes() == content
    assert merge_perf(path, remove_parts=True).rows == 2
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_a_torn_last_line_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    # Cut within the last number: without its end a line says something else.
    foreign(path, "node1-11", line(1), line(2, 0.2751)[:-2], end="")
    foreign(path, "node1-12", line(3))
    path.with_name(f"{path.name}.node1-13.part").write_bytes(HEADER[:20].encode())
    merged = merge_perf(path)
    assert (merged.rows, merged.torn) == (2, 2)
    assert [row["m"] for row in rows(path)] == ["1", "3"]


def test_a_line_with_too_few_cells_is_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    foreign(path, "node1-11", line(1), "TRTLLM,1.3.0rc23", line(2))
    assert (merge_perf(path).rows, merge_perf(path).torn) == (2, 1)


def test_rows_measured_twice_are_kept_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    foreign(path, "node1-11", line(1, 0.5), line(2, 0.5))
    foreign(path, "node1-12", line(1, 0.6))
    merged = merge_perf(path)
    assert (merged.rows, merged.duplicates) == (3, 1)


def test_other_columns_are_not_merged(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    foreign(path, "node1-11", line(1))
    path.with_name(f"{path.name}.node1-12.part").write_text(f"{HEADER},power\r\n{line(2)},3.0\r\n")
    with pytest.raises(BadInput, match="has columns"):
        merge_perf(path)
    assert not path.exists()


def test_who_merges_while_another_writes_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gemm_perf.txt"
    foreign(path, "node1-11", line(1))
    real, rounds = module._merge, []

    def late(target: Path, parts: list[Path]) -> module.Merged:
        merged = real(target, parts)
        rounds.append(len(parts))
        if len(rounds) == 1:  # another process logs and ends, having merged, before this replaced
            foreign(path, "node1-12", line(2))
        return merged

    monkeypatch.setattr(module, "_merge", late)
    assert merge_perf(path).rows == 2
    assert rounds == [1, 2]


# --- many processes ---


def test_the_one_file_is_there_when_a_program_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    done = run(ONE + "one(1)\none(2)", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["m"] for row in rows(path)] == ["1", "2"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_are_merged(tmp_path: Path, method: str) -> None:
    path = tmp_path / "gemm_perf.txt"
    context = multiprocessing.get_context(method)
    workers = [
        context.Process(target=log, args=(path, *(item(10 * w + i) for i in range(5))))
        for w in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    # Whatever order they ended in, the file is complete without any call.
    assert sorted(int(row["m"]) for row in rows(path)) == sorted(
        10 * w + i for w in range(3) for i in range(5)
    )


def test_a_forked_child_writes_to_a_part_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    code = (
        ONE
        + """
one(1)
child = os.fork()
one(2 if child else 3)
if child:
    os.waitpid(child, 0)
"""
    )
    done = run(code, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(tmp_path.glob("*.part"))) == 2
    assert sorted(row["m"] for row in rows(path)) == ["1", "2", "3"]


def test_rows_of_a_killed_process_are_merged_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    killed = run(ONE + "one(1)\nos.kill(os.getpid(), signal.SIGKILL)", path)
    assert killed.returncode == -signal.SIGKILL
    assert not path.exists()
    assert run(ONE + "one(2)", path).returncode == 0
    assert sorted(row["m"] for row in rows(path)) == ["1", "2"]


def test_a_process_of_the_same_number_does_not_touch_an_older_part(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    code = (
        ONE
        + """
import socket
name = f"{path}.{socket.gethostname()}-{os.getpid()}.part"
open(name, "w").write("of another container")
one(1)
""".replace("{path}", "{sys.argv[1]}")
    )
    run(code, path)
    texts = sorted(part.read_text() for part in tmp_path.glob("*.part"))
    assert len(texts) == 2
    assert "of another container" in texts
    assert [row["m"] for row in rows(path)] == ["1"]


def test_what_cannot_be_merged_at_the_end_is_said_and_safe(tmp_path: Path) -> None:
    path = tmp_path / "gemm_perf.txt"
    path.write_text("something,else\r\n1,2\r\n")
    done = run(ONE + "one(1)", path)
    assert done.returncode == 0
    assert done.stderr.startswith("opkit: ")
    assert "the rows are safe in" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == "something,else\n1,2\n"
    assert line(1) in part(path).read_text()
