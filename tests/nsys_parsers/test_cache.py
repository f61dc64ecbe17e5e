"""Parsed tables kept beside the export: used again, never wrong, never in the way."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_export import Export
from made_export import make_export
from read_tables import NO_CACHE, rows

from opkit.errors import BadInput, ToolMissing
from opkit.nsys_parsers import cache, parse, table
from opkit.nsys_parsers.export import open_export
from opkit.nsys_parsers.reading import Options, Reading
from opkit.nsys_parsers.table import open_table
from opkit.nsys_parsers.tool import find_nsys

TRACES = Path(__file__).parents[3] / "shared" / "traces"
CACHED = Reading()
NAMED = """SELECT k.* EXCLUDE (name_id, path_id), n.name, p.path FROM kernel k
    JOIN name n ON n.id = k.name_id JOIN path p ON p.id = k.path_id"""
ALL = f"{NAMED} ORDER BY ALL"
SUM = f"SELECT count(*), sum(hash(a)) FROM ({NAMED}) a"
STEPS = Reading(Options(step_pattern="self_attn"))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_export(tmp_path / "made.sqlite")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of every parse that is made from here on."""
    calls: list[Options] = []
    real = parse.parse

    def counting(*args: Any, **more: Any) -> None:
        calls.append(args[2])
        real(*args, **more)

    monkeypatch.setattr(parse, "parse", counting)
    return calls


def folder(path: Path) -> Path:
    return path.with_name(path.name + ".opkit")


def entries(path: Path) -> list[str]:
    """What lies in the cache folder of a file; nothing if there is none."""
    return sorted(each.name for each in folder(path).iterdir()) if folder(path).exists() else []


def only_entry(path: Path) -> Path:
    (name,) = entries(path)
    return folder(path) / name


def change(path: Path) -> None:
    """One more kernel; the file is another."""
    more = Export()
    more.launch("more", 100, 1_000)
    path.unlink()
    more.write(path)


# Used again, and only when it is the same.


def test_a_second_look_does_not_open_the_export(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_table([made], CACHED) as first:
        wanted, facts, ranks = first.rows(ALL), first.facts, first.ranks
    monkeypatch.setattr(table, "open_export", lambda path: pytest.fail(f"opened {path}"))
    with open_table([made], CACHED) as second:
        assert second.rows(ALL) == wanted
        assert (second.facts, second.ranks) == (facts, ranks)
    assert len(wanted) == 27


def test_facts_come_back_as_they_were(made: Path) -> None:
    with open_export(made) as export:
        wanted = export.facts
    for _ in range(2):
        with open_table([made], CACHED) as found:
            assert found.facts == (wanted,)


def test_without_the_cache_nothing_is_kept(made: Path, parsed: list[Options]) -> None:
    assert rows(made, ALL, NO_CACHE) == rows(made, ALL, NO_CACHE)
    assert len(parsed) == 2
    assert not folder(made).exists()


def test_a_changed_file_is_parsed_again_and_the_old_table_goes(
    made: Path, parsed: list[Options]
) -> None:
    assert len(rows(made, ALL, CACHED)) == 27
    old = only_entry(made)
    change(made)
    assert len(rows(made, ALL, CACHED)) == 1
    assert (len(parsed), only_entry(made) == old, old.exists()) == (2, False, False)


def test_a_file_changed_at_its_end_only(tmp_path: Path) -> None:
    """Of a large file samples are looked at, the last bytes among them."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(64 << 20)
    state = large.stat()
    found = set()
    for place in (0, state.st_size - 1):
        found.add(cache.digest(large))
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(large, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert len(found | {cache.digest(large)}) == 3


def test_equal_bytes_of_another_time_are_another_file(made: Path, parsed: list[Options]) -> None:
    rows(made, ALL, CACHED)
    os.utime(made, ns=(1, 1))
    rows(made, ALL, CACHED)
    assert len(parsed) == 2
    assert len(entries(made)) == 1


def test_other_options_have_a_table_of_their_own(made: Path, parsed: list[Options]) -> None:
    thread = Reading(Options(other_threads=False))
    for _ in range(2):
        for reading in (CACHED, STEPS, thread):
            rows(made, ALL, reading)
    assert parsed == [Options(), STEPS.options, thread.options]
    assert len(entries(made)) == 3
    steps = "SELECT count(*) FROM step"
    assert rows(made, steps, STEPS) != rows(made, steps, CACHED)


def test_memory_and_families_are_no_reason_to_parse_again(
    made: Path, parsed: list[Options]
) -> None:
    for memory in ("1GB", "256MB"):
        rows(made, ALL, replace(CACHED, memory=memory, partial=True))
    assert len(parsed) == 1


def test_another_version_of_the_parser_parses_again(
    made: Path, parsed: list[Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(made, ALL, CACHED)
    old = only_entry(made)
    monkeypatch.setattr(cache, "PARSER_VERSION", cache.PARSER_VERSION + 1)
    rows(made, ALL, CACHED)
    assert len(parsed) == 2
    assert only_entry(made) != old


@pytest.mark.parametrize("packed", [True, False])
def test_a_packed_export_is_cached_under_its_own_name(packed: bool, made: Path) -> None:
    path = made.with_name("it's.sqlite.gz")
    path.write_bytes(gzip.compress(made.read_bytes()) if packed else made.read_bytes())
    assert rows(path, ALL, CACHED) == rows(path, ALL, CACHED)
    assert entries(path)
    assert {each.name for each in made.parent.iterdir()} == {
        "made.sqlite", "it's.sqlite.gz", "it's.sqlite.gz.opkit",
    }  # fmt: skip


@pytest.mark.skipif(not TRACES.is_dir(), reason="no real exports (../shared/traces)")
def test_a_report_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        find_nsys()
    except ToolMissing as error:
        pytest.skip(str(error))
    report = tmp_path / "cudf_2020.qdrep"
    shutil.copy(TRACES / report.name, report)
    wanted = rows(report, ALL, CACHED)
    assert len(wanted) == 426
    monkeypatch.setenv("OPKIT_NSYS", str(tmp_path / "gone"))
    assert rows(report, ALL, CACHED) == wanted
    assert {each.name for each in tmp_path.iterdir()} == {report.name, report.name + ".opkit"}
    with pytest.raises(ToolMissing):
        rows(report, ALL, NO_CACHE)


# Damaged.


def truncate(entry: Path) -> None:
    file = entry / "kernel.parquet"
    file.write_bytes(file.read_bytes()[:100])


def flip(entry: Path) -> None:
    """As many bytes as before, and not those."""
    file = entry / "kernel.parquet"
    file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))


def no_facts(entry: Path) -> None:
    (entry / "facts.json").unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "empty": lambda entry: (entry / "name.parquet").write_bytes(b""),
    "flipped": flip,
    "a file gone": lambda entry: (entry / "path.parquet").unlink(),
    "no facts": no_facts,
    "facts cut": lambda entry: (entry / "facts.json").write_text('{"facts": {'),
    "other facts": lambda entry: (entry / "facts.json").write_text('{"sizes": {}}'),
    "facts that are no text": lambda entry: (entry / "facts.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_made_again(damage: str, made: Path, parsed: list[Options]) -> None:
    wanted = rows(made, ALL, CACHED)
    entry = only_entry(made)
    DAMAGE[damage](entry)
    for _ in range(2):  # the first may do without
        assert rows(made, ALL, CACHED) == wanted
    assert entries(made) == [entry.name]
    again = len(parsed)
    assert rows(made, ALL, CACHED) == wanted
    assert 2 <= len(parsed) == again <= 3


@pytest.mark.parametrize("age_s", [0, 3600])
def test_what_was_damaged_is_gone(age_s: int, made: Path) -> None:
    rows(made, ALL, CACHED)
    entry = only_entry(made)
    truncate(entry)
    os.utime(entry, (time.time() - age_s,) * 2)
    rows(made, ALL, CACHED)
    assert only_entry(made) == entry


def test_too_little_memory_is_no_damage(made: Path, parsed: list[Options]) -> None:
    """Reading fails, and the table stays for a reader with more."""
    rows(made, ALL, CACHED)
    with pytest.raises(BadInput):
        rows(made, ALL, replace(CACHED, memory="1MB"))
    rows(made, ALL, CACHED)
    assert len(parsed) == 1


# Nothing can be kept.


@contextlib.contextmanager
def disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A tmpfs of that size at ``place``."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_may_only_be_read(made: Path, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 4_000):
        path = Path(shutil.copy(made, tmp_path / "disk"))
        subprocess.run(["mount", "-o", "remount,ro", str(path.parent)], check=True)
        assert len(rows(path, ALL, CACHED)) == 27
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("room_kib", [0, 16, 24])
def test_a_disk_without_room_for_the_table(room_kib: int, made: Path, tmp_path: Path) -> None:
    """Kept nowhere then; that the export lies on a full disk is no fault of the export."""
    size_kib = -(-made.stat().st_size // 4096) * 4
    with disk(tmp_path / "disk", size_kib + room_kib):
        path = Path(shutil.copy(made, tmp_path / "disk"))
        assert len(rows(path, ALL, CACHED)) == 27
        assert all(not name.startswith("making-") for name in entries(path))


def test_a_file_where_the_folder_would_be(made: Path) -> None:
    folder(made).write_text("mine")
    assert len(rows(made, ALL, CACHED)) == 27
    assert folder(made).read_text() == "mine"


def test_a_file_system_without_locks(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre is mounted so on many clusters: flock ends with ENOSYS."""

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        assert len(rows(made, ALL, CACHED)) == 27
    assert all(not name.startswith("making-") for name in entries(made))


@pytest.mark.parametrize("raised", [BadInput("no"), KeyboardInterrupt(), OSError(5, "I/O")])
def test_what_stops_a_parse_is_passed_on_and_leaves_nothing(
    raised: BaseException, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_export: object, place: Path, *_: object) -> None:
        (place / "kernel.parquet").write_text("half")
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(parse, "parse", stopped)
        with pytest.raises(type(raised)):
            rows(made, ALL, CACHED)
    assert not folder(made).exists()
    assert len(rows(made, ALL, CACHED)) == 27


def test_a_refused_export_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none.sqlite"
    path.write_bytes(b"no database")
    with pytest.raises(BadInput, match="not an SQLite file"):
        open_table([path], CACHED)
    assert list(tmp_path.iterdir()) == [path]


# Several at once; killed ones.

CHILD = """
import sys, time
from pathlib import Path
from opkit.nsys_parsers import cache, parse
from opkit.nsys_parsers.reading import Options, Reading
from opkit.nsys_parsers.table import open_table
what, path = sys.argv[1], Path(sys.argv[2])
real = parse.parse
def slow(export, folder, *rest):
    real(export, folder, *rest)
    print("filled", flush=True)
    sys.stdin.readline()
if what == "wait":
    parse.parse = slow
else:
    print("ready", flush=True)
    sys.stdin.readline()
with open_table([path], Reading()) as table:
    print(table.rows(sys.argv[3]), flush=True)
"""


class Child:
    """Another opkit that opens the same file; ``wait``: it stops between filling and publishing."""

    def __init__(self, what: str, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, what, str(path), SUM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"TMPDIR": str(path.parent)},  # what is killed leaves its scratch
        )  # fmt: skip

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> int:
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.mark.parametrize("many", [2, 8])
def test_several_at_once_make_one_table(many: int, made: Path) -> None:
    wanted = str(rows(made, SUM, NO_CACHE))
    children = [Child("go", made) for _ in range(many)]
    assert [child.line() for child in children] == ["ready"] * many
    for child in children:
        child.go_on()
    assert [child.line() for child in children] == [wanted] * many
    assert [child.end() for child in children] == [0] * many
    assert only_entry(made).name.startswith(cache.digest(made))


def test_what_a_killed_maker_left_goes_with_the_next(made: Path) -> None:
    child = Child("wait", made)
    assert child.line() == "filled"
    (left,) = entries(made)
    child.process.send_signal(signal.SIGKILL)
    assert child.end() == -signal.SIGKILL
    assert entries(made) == [left]
    assert len(rows(made, ALL, CACHED)) == 27
    assert left not in entries(made)
    assert len(entries(made)) == 1


def test_a_maker_at_work_is_left_alone(made: Path, parsed: list[Options]) -> None:
    """Even if it works on a table of the file as it was."""
    child = Child("wait", made)
    assert child.line() == "filled"
    (making,) = entries(made)
    rows(made, ALL, STEPS)
    rows(made, ALL, CACHED)
    assert len(entries(made)) == 3
    assert making in entries(made)
    child.go_on()
    assert child.line().startswith("[(27,")
    assert child.end() == 0
    assert len(entries(made)) == 2
    assert parsed == [STEPS.options, Options()]


def test_an_old_folder_without_a_lock_goes_a_new_one_stays(made: Path) -> None:
    """A maker may not have locked its folder yet."""
    for name in ("making-old", "making-new"):
        (folder(made) / name).mkdir(parents=True)
    os.utime(folder(made) / "making-old", (time.time() - 600,) * 2)
    rows(made, ALL, CACHED)
    left = entries(made)
    assert "making-old" not in left
    assert "making-new" in left
    assert len(left) == 2


def test_an_entry_says_what_belongs_to_it(made: Path) -> None:
    rows(made, ALL, CACHED)
    entry = only_entry(made)
    files = {file.name: file.stat().st_size for file in entry.iterdir()}
    del files["facts.json"]
    assert json.loads((entry / "facts.json").read_text())["sizes"] == files
    assert set(files) == {f"{n}.parquet" for n in ("kernel", "name", "path", "range", "step")}
