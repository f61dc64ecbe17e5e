"""nsys found and called: its exports are believed only when they are new and are databases."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from opkit.errors import BadInput, RunFailed, ToolMissing
from opkit.layers.manifest import sidecar_of
from opkit.nsys_parsers.tool import export_sqlite, find_nsys

TRACES = Path(__file__).parents[3] / "shared" / "traces"


def _real_nsys() -> str | None:
    try:
        return str(find_nsys().path)
    except ToolMissing:
        return None


needs_nsys = pytest.mark.skipif(_real_nsys() is None, reason="no nsys here: set OPKIT_NSYS or PATH")

PRETENDED = """#!{python}
import os, sqlite3, sys
if sys.argv[1] == "--version":
    print("NVIDIA Nsight Systems version 2024.2.3.38-pretended")
    sys.exit()
target = sys.argv[sys.argv.index("--output") + 1]
{body}
"""
WRITES = """
database = sqlite3.connect(target)
database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
database.close()
"""


def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """Install an nsys whose export does ``body``; return a report for it."""
    nsys = tmp_path / "nsys"
    nsys.write_text(PRETENDED.format(python=sys.executable, body=body))
    nsys.chmod(0o755)
    monkeypatch.setenv("OPKIT_NSYS", str(nsys))
    report = tmp_path / "made.nsys-rep"
    report.write_bytes(b"a recording")
    return report


def tables(export: Path) -> set[str]:
    with closing(sqlite3.connect(export)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master")}


def test_export_lands_beside_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pretend(tmp_path, monkeypatch, WRITES)
    export = export_sqlite(report)
    assert export == tmp_path / "made.sqlite"
    assert tables(export) == {"StringIds"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "made.nsys-rep",
        "made.sqlite",
        "nsys",
    ]


def test_manifest_is_carried_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = pretend(tmp_path, monkeypatch, WRITES)
    sidecar_of(report).write_text("opaque: 4 × 1,024\n")
    export = export_sqlite(report, tmp_path / "sub" / "x.sqlite")
    with closing(sqlite3.connect(export)) as database:
        rows = database.execute("SELECT key, value FROM OPKIT_MANIFEST").fetchall()
    assert rows == [("manifest", "opaque: 4 × 1,024\n")]


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        ("", RunFailed, "ended with code 0 but wrote nothing"),
        ("open(target, 'w').close()", RunFailed, "wrote nothing"),
        ("open(target, 'w').write('x' * 100)", RunFailed, "not an SQLite database"),
        ("sys.exit('Segmentation fault')", RunFailed, "ended with code 1: Segmentation fault"),
        (
            "sys.exit('Exportation error: Report was created in Nsight Systems version '"
            "'(2025.6.1.190-25613689), newer than your current version (2024.2.3.38).')",
            BadInput,
            r"recorded by nsys 2025.6.1.190-25613689, newer than the nsys found \(2024.2.3",
        ),
        (
            "sys.exit('std::exception::what: ProtobufParseException')",
            BadInput,
            "damaged or not an nsys report",
        ),
    ],
)
def test_failed_export_is_told_and_the_old_one_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    error: type[Exception],
    sentence: str,
) -> None:
    report = pretend(tmp_path, monkeypatch, body)
    old = tmp_path / "made.sqlite"
    old.write_text("of another day")
    with pytest.raises(error, match=sentence):
        export_sqlite(report)
    assert old.read_text() == "of another day"
    assert not list(tmp_path.glob("*.partial*"))


def test_bad_reports_are_refused_without_nsys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPKIT_NSYS", str(tmp_path / "never called"))
    with pytest.raises(BadInput, match="no such report"):
        export_sqlite(tmp_path / "none.nsys-rep")
    empty = tmp_path / "empty.nsys-rep"
    empty.touch()
    with pytest.raises(BadInput, match="is empty"):
        export_sqlite(empty)
    empty.write_text("x")
    with pytest.raises(BadInput, match="overwrite the report"):
        export_sqlite(empty, empty)


def test_missing_nsys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opkit.nsys_parsers.tool._USUAL_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OPKIT_NSYS", raising=False)
    with pytest.raises(ToolMissing, match="not found on PATH") as caught:
        find_nsys()
    assert "OPKIT_NSYS" in (caught.value.hint or "")
    monkeypatch.setenv("OPKIT_NSYS", str(tmp_path / "nsys"))
    with pytest.raises(ToolMissing, match="not an executable file"):
        find_nsys()


def test_nsys_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nsys = tmp_path / "nsys"
    nsys.write_text(f"#!{sys.executable}\nraise SystemExit('libQt missing')\n")
    nsys.chmod(0o755)
    monkeypatch.setenv("OPKIT_NSYS", str(nsys))
    with pytest.raises(ToolMissing, match="libQt missing"):
        find_nsys()


def test_newest_of_the_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("2024.9.1", "2024.10.1"):
        place = tmp_path / version / "nsys"
        place.parent.mkdir()
        place.write_text(f"#!{sys.executable}\nprint('Nsight Systems version {version}')\n")
        place.chmod(0o755)
    monkeypatch.setattr("opkit.nsys_parsers.tool._USUAL_PLACES", (f"{tmp_path}/*/nsys",))
    monkeypatch.setenv("PATH", os.devnull)
    monkeypatch.delenv("OPKIT_NSYS", raising=False)
    assert find_nsys().version == "2024.10.1"


@needs_nsys
def test_real_recording_exports(tmp_path: Path) -> None:
    nsys = find_nsys()
    report = tmp_path / "made.nsys-rep"
    options = ["-t", "osrt", "--sample=none", "--cpuctxsw=none", "-o", str(tmp_path / "made")]
    program = [sys.executable, "-c", "import time; time.sleep(0.1)"]
    subprocess.run([nsys.path, "profile", *options, *program], check=True, capture_output=True)
    sidecar_of(report).write_text("{}")
    assert {"StringIds", "META_DATA_EXPORT", "OPKIT_MANIFEST"} <= tables(export_sqlite(report))


@needs_nsys
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("neg_interrupted_2025.nsys-rep", "damaged or not an nsys report"),
        ("sglang_llama_2025_6.nsys-rep", "recorded by nsys 2025.6.1.190-256136895201v0, newer"),
        ("made up", "damaged or not an nsys report"),
    ],
)
def test_real_nsys_refuses(tmp_path: Path, name: str, sentence: str) -> None:
    version = find_nsys().version
    report = TRACES / name
    newer = name.startswith("sglang")
    if not report.is_file() or (newer and not version.startswith("2024")):
        report, sentence = tmp_path / "made.nsys-rep", "damaged or not an nsys report"
        report.write_bytes(b"\1\2\3" * 1000)
    with pytest.raises(BadInput, match=sentence):
        export_sqlite(report, tmp_path / "out.sqlite")
    assert not (tmp_path / "out.sqlite").exists()


@needs_nsys
def test_real_nsys_reads_an_old_report(tmp_path: Path) -> None:
    old = TRACES / "cudf_2020.qdrep"
    if not old.is_file():  # then at least: what is no report is refused under the old name, too
        old = tmp_path / "made.qdrep"
        old.write_bytes(b"QuadD" * 1000)
        with pytest.raises(BadInput, match="damaged"):
            export_sqlite(old, tmp_path / "out.sqlite")
        return
    export = export_sqlite(old, tmp_path / "out.sqlite")
    with closing(sqlite3.connect(export)) as database:
        (kernels,) = database.execute("SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL").fetchone()
    assert kernels == 268
