"""Rows on disk: what is written is read, what is torn is left out, and no row counts twice."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opkit.collect.measurement import KernelTime, Measurement, Power
from opkit.collect.work import Fault, Row
from opkit.collect.workers import parts as parts_module
from opkit.collect.workers.parts import Part, PartFailed, Parts, read_parts
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode
from opkit.sensors.state import GpuState


def row_of(key: str, *, ok: bool = True, created: str = "2026-01-01", attempts: int = 1) -> Row:
    return Row(
        key,
        "group",
        "table",
        {"m": 1, "how": "×"},
        {"m": 1, "n": 1, "k": 1, "dtype": "float32", "mode": "graph"},
        measurement=Measurement(elapsed_ms=(1.5, 2.5)) if ok else None,
        fault=None if ok else Fault.TIMEOUT,
        error="" if ok else "too\nlong",
        created=created,
        attempts=attempts,
    )


def put(folder: Path, name: str, *rows: Row, tail: str = "") -> Path:
    path = folder / "parts" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("".join(f"{row.to_json()}\n" for row in rows) + tail)
    return path


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    state = GpuState(1980, 2619, 40, 300.5, ("power",))
    full = replace(
        row_of("a"),
        measurement=Measurement(
            (1.0, 2.0), (0.5,), LaunchMode.GRAPH, (KernelTime("gemm", 2, 3.5),), before=state,
            power=Power(300.0, 700.0, 0.3, "sampling", 1.0, 20),
        ),
    )  # fmt: skip
    part = Part(tmp_path)
    assert not part.path.exists(), "a process that measures nothing leaves no file"
    part.append(full)
    part.append(row_of("b", ok=False))
    part.close()
    assert read_parts(tmp_path).rows == {"a": full, "b": row_of("b", ok=False)}


def test_each_part_is_a_file_of_its_own(tmp_path: Path) -> None:
    one, other = Part(tmp_path), Part(tmp_path)
    one.append(row_of("a"))
    other.append(row_of("b"))
    assert one.path != other.path
    assert str(os.getpid()) in one.path.name
    assert set(read_parts(tmp_path).rows) == {"a", "b"}


def test_a_part_is_never_taken_over(tmp_path: Path) -> None:
    part = Part(tmp_path)
    part.path.parent.mkdir()
    part.path.write_text("somebody else's\n")
    with pytest.raises(PartFailed, match="File exists"):
        part.append(row_of("a"))
    assert part.path.read_text() == "somebody else's\n"


def test_no_folder_is_no_rows(tmp_path: Path) -> None:
    assert read_parts(tmp_path).rows == {}


def test_a_value_beats_a_failure_whichever_came_first(tmp_path: Path) -> None:
    put(tmp_path, "x", row_of("a", ok=False, created="1"), row_of("b", created="2"))
    put(tmp_path, "y", row_of("a", created="2"), row_of("b", ok=False, created="1"))
    found = read_parts(tmp_path)
    assert found.done("a")
    assert found.done("b")
    assert found.failed() == {}


def test_among_equals_the_first_counts(tmp_path: Path) -> None:
    first = replace(row_of("a", created="1"), host="first")
    put(tmp_path, "x", row_of("a", created="2"))
    put(tmp_path, "y", first)
    put(tmp_path, "z", replace(first, host="same moment, later part"))
    assert read_parts(tmp_path).rows == {"a": first}


def test_failures_are_told_with_all_their_attempts(tmp_path: Path) -> None:
    put(tmp_path, "x", row_of("a", ok=False, created="1", attempts=2))
    put(tmp_path, "y", row_of("a", ok=False, created="2", attempts=1))
    failed = read_parts(tmp_path).failed()["a"]
    assert (failed.fault, failed.error, failed.attempts) == (Fault.TIMEOUT, "too\nlong", 3)


def test_a_torn_last_line_is_left_out_and_counted(tmp_path: Path) -> None:
    line = row_of("b").to_json()
    put(tmp_path, "x", row_of("a"), tail=line[:40])
    put(tmp_path, "y", row_of("c"), tail=line)  # complete, but for its end
    put(tmp_path, "z", row_of("d"))
    found = read_parts(tmp_path)
    assert set(found.rows) == {"a", "c", "d"}
    assert found.torn == 2


@pytest.mark.parametrize("bad", ["{not json", "[]", '{"schema": "opkit.row/9"}', "", '{"key": 1}'])
def test_another_unreadable_line_is_an_error_with_its_place(tmp_path: Path, bad: str) -> None:
    path = put(tmp_path, "x", row_of("a"), tail=f"{bad}\n{row_of('b').to_json()}\n")
    with pytest.raises(BadInput, match=f"{path.name}, line 2"):
        read_parts(tmp_path)


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    path = put(tmp_path, "x", row_of("a"))
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(BadInput, match="line 2: not text"):
        read_parts(tmp_path)


def test_while_others_write_an_unreadable_line_waits(tmp_path: Path) -> None:
    path = put(tmp_path, "x", row_of("a"), tail="\0\0\0\n")
    parts = Parts(tmp_path)
    assert parts.refresh(strict=False) == 1
    put(tmp_path, "x", row_of("a"), row_of("b"))  # now the bytes have arrived
    assert parts.refresh(strict=False) == 1
    assert set(parts.rows) == {"a", "b"}
    assert path.is_file()


def test_only_what_was_added_is_read_again(tmp_path: Path) -> None:
    part, parts = Part(tmp_path), Parts(tmp_path)
    part.append(row_of("a"))
    assert parts.refresh() == 1
    assert parts.refresh() == 0
    part.append(row_of("b"))
    put(tmp_path, "other", row_of("c"), tail='{"half')
    assert parts.refresh() == 2
    assert set(parts.rows) == {"a", "b", "c"}
    assert parts.torn == 1
    put(tmp_path, "other", row_of("c"), row_of("d"))
    assert parts.refresh() == 1
    assert parts.torn == 0


def test_files_that_are_no_parts_are_let_be(tmp_path: Path) -> None:
    put(tmp_path, "x", row_of("a"))
    (tmp_path / "parts" / ".nfs0001").write_text("what NFS leaves")
    assert set(read_parts(tmp_path).rows) == {"a"}


def test_a_row_that_is_half_written_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = Part(tmp_path)
    part.append(row_of("a"))
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.os, "write", lambda file, data: real(file, data[:30]))
        with pytest.raises(PartFailed, match="No space left") as caught:
            part.append(row_of("b"))
    assert caught.value.hint is not None
    assert part.path.read_text() == row_of("a").to_json() + "\n"


def test_a_row_that_did_not_reach_the_disk_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_file: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    part = Part(tmp_path)
    part.append(row_of("a"))
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.os, "fsync", fsync)
        with pytest.raises(PartFailed, match="quota"):
            part.append(row_of("b"))
    assert set(read_parts(tmp_path).rows) == {"a"}
    assert read_parts(tmp_path).torn == 0


def test_where_not_even_that_is_possible_the_row_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    part = Part(tmp_path)
    part.append(row_of("a"))
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(parts_module.os, "write", lambda file, data: real(file, data[:30]))
        patch.setattr(parts_module.os, "ftruncate", refuse)
        with pytest.raises(PartFailed):
            part.append(row_of("b"))
    found = read_parts(tmp_path)
    assert set(found.rows) == {"a"}
    assert found.torn == 1


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file")
    with pytest.raises(PartFailed, match="a row could not be written"):
        Part(tmp_path).append(row_of("a"))


def test_two_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from opkit.collect.workers.parts import Part;"
        "from opkit.collect.work import Row; from opkit.collect.measurement import Measurement;"
        "part = Part(Path(sys.argv[1]));"
        "[part.append(Row(f'{sys.argv[2]}{n}', 'g', 't', {}, {}, Measurement((1.0,))))"
        " for n in range(50)]"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(read_parts(tmp_path).rows) == 100
