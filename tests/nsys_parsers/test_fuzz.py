"""A short fuzz run, and the smallest form of what longer ones found.

`python tests/nsys_parsers/fuzz.py --inputs 2500 --seed N` is the long run.
"""

from __future__ import annotations

import gzip
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import PROGRAM, environment
from fuzz import ask, fuzz, judge
from gpu_export import KERNEL, NODES, NVTX, RUNTIME, Export, module
from made_export import EAGER_STEP, make_export

INPUTS, SEED = 150, 7
IN_TIME_S = 30  # for what would take minutes or hours if it took the square of its rows


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return make_export(tmp_path / "in.sqlite")


def told(*words: object) -> tuple[str, str]:
    """(accepted, stdout) or (refused, stderr); fails with the complaint of ``fuzz.judge``."""
    asked = list(map(str, words))
    answer = ask(asked)
    outcome, said = judge(asked, answer)
    assert outcome != "failed", f"{said}\n{answer.err}"
    return outcome, answer.out if outcome == "accepted" else answer.err


def accepted(*words: object) -> Any:
    """The JSON of a question that must be answered."""
    outcome, text = told(*words, "--json")
    assert outcome == "accepted", text
    return json.loads(text)


def refused(*words: object) -> str:
    """The sentence of a question that must be refused."""
    outcome, text = told(*words)
    assert outcome == "refused"
    return text.splitlines()[0]


def in_time(*command: object) -> None:
    """Run a program; one that does not end in time fails."""
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment(),
            timeout=IN_TIME_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end in {IN_TIME_S} s")
    assert done.returncode == 0, done.stderr


def made(path: Path, script: Iterable[str] = (), cells: tuple[Any, ...] = ()) -> Path:
    """An export of two kernels in a module in a step, changed by SQL; ``?`` is ``cells``."""
    export = Export()
    export.range(EAGER_STEP, 0, 1_000)
    export.range(module("model.layers.0.mlp"), 10, 900)
    for at in (20, 30):
        export.launch("gemm", at, at + 2_000)
    export.node(1, 5)
    export.write(path)
    db = sqlite3.connect(path)
    # Types that SQLite does not hold to, and NOT NULL as little as a damaged file does.
    db.execute("PRAGMA writable_schema = on")
    db.execute("UPDATE sqlite_master SET sql = replace(sql, 'NOT NULL', '')")
    db.commit()
    db.close()
    db = sqlite3.connect(path)
    for statement in script:
        db.execute(statement, cells if "?" in statement else ())
    db.commit()
    db.close()
    return path


def retyped(path: Path, table: str, column: str, kind: str) -> Path:
    """The export with one column declared otherwise and its cells cast to that."""
    declared = f'SELECT *, CAST("{column}" AS {kind}) AS other FROM {table}'
    steps = [f"CREATE TABLE was AS {declared}", f"DROP TABLE {table}"]
    steps += [f'ALTER TABLE was DROP COLUMN "{column}"']
    steps += [f'ALTER TABLE was RENAME other TO "{column}"', f"ALTER TABLE was RENAME TO {table}"]
    return made(path, steps)


def test_a_short_fuzz_run() -> None:
    done = fuzz(range(INPUTS), SEED, jobs=2, small=True, quick=True).told
    failed = [f"{t.number} {t.kind}: {t.words}: {t.said}" for t in done if t.outcome == "failed"]
    assert not failed, "\n".join(failed)
    assert {t.number for t in done} == set(range(INPUTS))
    outcomes = [t.outcome for t in done]
    assert min(outcomes.count("accepted"), outcomes.count("refused")) >= INPUTS / 3


def test_an_input_is_the_same_each_time(tmp_path: Path) -> None:
    from fuzz_files import make

    for number in range(14):
        one, other = (make(3, number, tmp_path / f"{n}" / f"{number}", []) for n in "ab")
        assert [w.replace(str(one.folder), "") for ask in one.asks for w in ask] == [
            w.replace(str(other.folder), "") for ask in other.asks for w in ask
        ]
        for name in one.listing():
            if (one.folder / name).suffix == ".sqlite" and (one.folder / name).is_file():
                assert _dump(one.folder / name) == _dump(other.folder / name)


def _dump(path: Path) -> object:
    """Rows, or the bytes of what holds none: SQLite stamps its own version into files."""
    try:
        db = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        db.text_factory = bytes
        names = [r[0].decode() for r in db.execute("SELECT name FROM sqlite_master")]
        return [(name, db.execute(f'SELECT * FROM "{name}"').fetchall()) for name in names]
    except (sqlite3.Error, UnicodeDecodeError):
        return path.read_bytes()[100:]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((70, "", "Traceback (most recent call last):\n"), "?"),
        ((0, "{", ""), "not JSON"),
        ((0, '{"a": NaN}', ""), "not JSON"),
        ((0, "{}", "RuntimeWarning: overflow\n"), "on stderr"),
        ((4, "", ""), "without a sentence"),
        ((4, "", "opkit: a\nb\n"), "more than a sentence"),
        ((6, "", "opkit: a\n"), "exit 6"),
        ((1, "{}", ""), "exit 1"),
        ((-11, "", ""), "exit -11"),
    ],
)  # fmt: skip
def test_what_the_run_calls_a_failure(answer: tuple[int, str, str], said: str) -> None:
    from fuzz import Answer

    outcome, why = judge(["kernels", "--json"], Answer(*answer))
    assert outcome == "failed"
    assert said in why


# Options that are odd, not the file.


@pytest.mark.parametrize("step", ["٣", "9" * 30, "0" * 400, "²"])
def test_a_step_that_only_looks_like_a_number(good: Path, step: str) -> None:
    assert "no step has" in refused("steps", good, "--step", step)


@pytest.mark.parametrize("option", ["--module", "--step", "--step-pattern"])
def test_an_argument_that_is_no_utf8(good: Path, option: str) -> None:
    assert "no UTF-8" in refused("steps", good, option, os.fsdecode(b"\xff"))


@pytest.mark.parametrize("option", ["--perfetto", "--parquet"])
@pytest.mark.parametrize("target", ["/", "."])
def test_a_folder_as_the_file_to_write(good: Path, option: str, target: str) -> None:
    assert target in refused("kernels", good, option, target)


@pytest.mark.parametrize(
    "text", [b"\xff", b"family = 3", b"family = [3]", b"[[family]]\nfamily='x'\npattern=3",
             b"[[family]]\nfamily='x'\npattern='.'\ndtype='.'"],
)  # fmt: skip
def test_a_families_file_that_is_none(good: Path, text: bytes) -> None:
    families = good.with_name("families.toml")
    families.write_bytes(text)
    assert "families.toml" in refused("kernels", good, "--families", families)


# Files.


@pytest.mark.parametrize("name", ["a\nb.sqlite", "a\x1b[31m\r.sqlite"])
def test_a_name_with_control_characters(good: Path, name: str) -> None:
    path = good.rename(good.with_name(name))
    path.write_bytes(path.read_bytes()[:-9])
    said = refused("kernels", path)
    assert "truncated" in said
    assert said.isprintable()


def test_a_link_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "in.sqlite"
    path.symlink_to(path)
    assert "no such file" in refused("steps", path)


@pytest.mark.parametrize("at", [0.3, 0.6])
def test_a_gzip_file_with_a_flipped_bit(good: Path, at: float) -> None:
    data = bytearray(gzip.compress(good.read_bytes(), 1))
    for place in range(int(at * len(data)), int(at * len(data)) + 40):
        data[place] ^= 255  # an invalid block, not only a wrong sum
    good.write_bytes(data)
    assert "gzip file is damaged" in refused("kernels", good)


def test_a_schema_whose_error_has_lines(good: Path) -> None:
    data = good.read_bytes()
    good.write_bytes(data.replace(b"(\n    timestamp INTEGER", b'(\n    "imestamp INTEGER', 1))
    assert "damaged" in refused("kernels", good)


@pytest.mark.parametrize("log", [False, True])
def test_write_ahead_log_mode_leaves_nothing(good: Path, log: bool) -> None:
    db = sqlite3.connect(good)
    db.execute("PRAGMA journal_mode = wal")
    db.execute("DELETE FROM CUPTI_ACTIVITY_KIND_KERNEL WHERE demangledName = 1")
    db.commit()
    wal = good.with_name("in.sqlite-wal")
    kept = wal.read_bytes()
    db.close()
    if log:
        wal.write_bytes(kept)
    before = set(good.parent.iterdir())
    names = [row["short"] for row in accepted("kernels", good)["kernels"]]
    assert "cutlass::gemm" not in names
    assert len(names) == 2
    accepted("steps", good)
    assert {p for p in good.parent.iterdir() if p.suffix != ".opkit"} == before


@pytest.mark.parametrize("part", ["kernel.parquet", "name.parquet", "path.parquet", "facts.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_cache(good: Path, part: str, how: str) -> None:
    sound = accepted("steps", good)
    (found,) = good.with_name("in.sqlite.opkit").rglob(part)
    data = found.read_bytes()
    match how:
        case "flipped":
            found.write_bytes(bytes(b ^ 85 for b in data))
        case "cut":
            found.write_bytes(data[:-3])
        case "gone":
            found.unlink()
    assert accepted("steps", good) == sound
    left = [path.name for path in good.with_name("in.sqlite.opkit").iterdir()]
    assert not [name for name in left if name.startswith("making-")]


def test_a_damaged_cache_of_names(good: Path) -> None:
    sound = accepted("kernels", good)
    (found,) = good.with_name("in.sqlite.opkit").rglob("kernels.json")
    found.write_bytes(b"\xff" * len(found.read_bytes()))
    assert accepted("kernels", good) == sound


# Contents.


def test_two_kernels_whose_names_are_missing(tmp_path: Path) -> None:
    script = [f"UPDATE {KERNEL} SET demangledName = 70 + rowid, shortName = 0"]
    path = made(tmp_path / "in.sqlite", script)
    for level in ("demangled", "short", "family"):
        found = accepted("kernels", path, "--by", level, "--copies")
        assert found["unattributed"]["name"] == 2
        assert [row["calls"] for row in found["kernels"]] == [2]


@pytest.mark.parametrize("digits", ["9" * 20, "9" * 5_000])
def test_a_step_of_very_many_requests(good: Path, digits: str) -> None:
    db = sqlite3.connect(good)
    label = f"execute_context_{digits}(1)_generation_0(0)"
    db.execute("UPDATE NVTX_EVENTS SET text = ? WHERE text = ?", (label, EAGER_STEP))
    db.commit()
    db.close()
    accepted("steps", good)


@pytest.mark.parametrize(
    ("table", "column"),
    [(KERNEL, "start"), (KERNEL, "globalPid"), (KERNEL, "gridX"), (RUNTIME, "globalTid"),
     (NODES, "graphNodeId"), (NVTX, "end"), (NVTX, "textId")],
)  # fmt: skip
def test_bytes_that_are_no_text_where_a_number_should_be(
    tmp_path: Path, table: str, column: str
) -> None:
    script = [f'UPDATE {table} SET "{column}" = CAST(? AS TEXT)']
    path = made(tmp_path / "in.sqlite", script, (b"\xff\xfe",))
    assert "cannot be read" in refused("steps", path)
    assert "cannot be read" in refused("open_trace", path)


@pytest.mark.parametrize(
    ("table", "column", "kind"),
    [(KERNEL, "start", "TEXT"), (KERNEL, "streamId", "TEXT"), (KERNEL, "globalPid", "REAL"),
     (RUNTIME, "globalTid", "TEXT"), (RUNTIME, "start", "REAL"), (NODES, "globalTid", "TEXT"),
     (NVTX, "start", "TEXT"), (NVTX, "end", "REAL"), (NVTX, "globalTid", "TEXT")],
)  # fmt: skip
def test_numbers_declared_as_something_else(
    tmp_path: Path, table: str, column: str, kind: str
) -> None:
    sound = accepted("summary", made(tmp_path / "sound.sqlite"))
    found = accepted("summary", retyped(tmp_path / "in.sqlite", table, column, kind))
    assert {**found, "facts": None} == {**sound, "facts": None}


@pytest.mark.parametrize("kind", ["DATE", "TIMESTAMP", "BLOB"])
@pytest.mark.parametrize(("table", "column"), [(KERNEL, "end"), ("StringIds", "id")])
def test_numbers_declared_as_what_no_number_is(
    tmp_path: Path, table: str, column: str, kind: str
) -> None:
    path = retyped(tmp_path / "in.sqlite", table, column, kind)
    for question in ("summary", "kernels", "open_trace"):
        told(question, path)


@pytest.mark.parametrize("column", ["start", "end"])
def test_a_kernel_without_its_times(tmp_path: Path, column: str) -> None:
    path = made(tmp_path / "in.sqlite", [f'UPDATE {KERNEL} SET "{column}" = NULL WHERE rowid = 1'])
    for question in ("summary", "kernels", "open_trace"):
        assert "without its times" in refused(question, path)


def test_times_that_cannot_be_are_said_to_be_the_files(tmp_path: Path) -> None:
    script = [f'UPDATE {KERNEL} SET start = -9223372036854775808, "end" = 4611686018427387904']
    path = made(tmp_path / "in.sqlite", script)
    outcome, text = told("summary", path)
    assert outcome == "refused"
    assert "times" in text
    assert ".opkit" not in text  # removing the cache would not help


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    export = Export()
    export.launch("gemm", 80, 100)
    for number in range(70):
        export.range("A" * 100_000 + str(number), number, 1_000 - number)
    path = export.write(tmp_path / "in.sqlite")
    outcome, text = told("modules", path, "--json", "--memory", "300MB")
    assert outcome == "accepted" or "--memory" in text


# What would take the square of its rows.


def _command(question: str, path: Path) -> list[object]:
    return [*PROGRAM, "trace", question, path, "--json"]


def test_ranges_that_were_never_closed(tmp_path: Path) -> None:
    export = Export()
    for number in range(100_000):
        export.range("push without pop", number, None)
    export.launch("gemm", 100_100, 100_200)
    in_time(*_command("modules", export.write(tmp_path / "in.sqlite")))


def test_launches_after_deeply_nested_ranges(tmp_path: Path) -> None:
    export, deep = Export(), 90_000
    export.range("around", 0, 10**9)
    for number in range(deep):
        export.range("deep", 1 + number, 10**6 - number)
    for number in range(deep):
        export.launch("gemm", 2 * 10**6 + number, 3 * 10**6 + number)
    in_time(*_command("modules", export.write(tmp_path / "in.sqlite")))


CROSSING = """
import numpy as np
from opkit.nsys_parsers.stacks import Stacks
n = 120_000
start = np.arange(2 * n)
end = np.append(10**9 - np.arange(n), 5 * 10**8 + np.arange(n))
end[0] = 2 * 10**9
end[1:n] = 10**8 - np.arange(n - 1)
assert (Stacks(np.full(2 * n, 7), start, end).parent[n:] == 0).all()
"""


def test_ranges_that_cross_after_deeply_nested_ones() -> None:
    in_time(sys.executable, "-c", CROSSING)


@pytest.mark.parametrize("text", ["a." * 50_000, "a/" * 30_000, module("layers.0." * 10_000)])
def test_a_path_of_very_many_parts(tmp_path: Path, text: str) -> None:
    export = Export()
    export.launch("gemm", 50, 100)
    export.range(text, 0, 100)
    in_time(*_command("modules", export.write(tmp_path / "in.sqlite")))
