"""The command line on files: reports, exit codes, and one sentence for every bad input."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import PROGRAM, Ran, environment, run_main, run_program
from click.testing import CliRunner
from made_export import make_export
from made_pair import engine, mock

from opkit.align.ledger import Ledger
from opkit.cli import cli
from opkit.errors import EXIT_BAD_INPUT, EXIT_TOOL_MISSING, EXIT_USAGE

KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
Opkit = Callable[..., Ran]


@pytest.fixture
def opkit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """Runs ``opkit WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: run_main(capsys, monkeypatch, *words)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A mock's trace and the engine's that agree."""
    folder = tmp_path_factory.mktemp("pair")
    return mock().write(folder / "mock.sqlite"), engine().write(folder / "e2e.sqlite")


def test_a_true_pair_passes_and_is_recorded(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", pair[1])
    assert ran.code == 0
    assert " PASS " in ran.out
    assert "recorded as dsa-" in ran.err
    rows = [line.split()[:4] for line in opkit("status").out.splitlines()]
    assert ["dsa", "context", "✓", "pass"] in rows
    assert ["dsa", "generation", "✓", "pass"] in rows
    entries = json.loads(opkit("status", "dsa", "--json").out)["entries"]
    assert sorted((entry["phase"], entry["verdict"]) for entry in entries) == [
        ("context", "pass"),
        ("generation", "pass"),
    ]
    assert (tmp_path / "opkit-out" / "ledger.db").is_file()


def test_the_bundled_recording_is_judged_and_enters_no_ledger(opkit: Opkit) -> None:
    ran = opkit("align", "dsa", "--recorded")
    assert ran.code == 0
    assert "a bundled recording enters no ledger; a run with --e2e-cmd does" in ran.err
    assert not (Path.cwd() / "opkit-out" / "ledger.db").exists()


def test_json_is_one_object_of_the_documented_form(opkit: Opkit, pair: tuple[Path, Path]) -> None:
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", pair[1], "--json")
    data = json.loads(ran.out)
    assert (data["schema"], data["verdict"]) == ("opkit.align/1", "pass")
    assert set(data["phases"]) == {"context", "generation"}
    for phase in data["phases"].values():
        assert {"verdict", "method", "attributed", "checks", "kernels"} <= set(phase)
        assert {"check", "outcome", "detail"} <= set(phase["checks"][0])
    assert data["provenance"]["files"][0]["name"] == "mock.sqlite"


def test_a_wrong_mock_fails_with_its_reason(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    eager = mock(eager=True).write(tmp_path / "eager.sqlite")
    ran = opkit("align", "dsa", "--mock-trace", eager, "--e2e-trace", pair[1])
    assert ran.code == 1
    assert "mock eager, E2E graph" in " ".join(ran.out.split())


def test_too_few_regions_are_inconclusive(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    short = mock(iterations=2).write(tmp_path / "short.sqlite")
    ran = opkit("align", "dsa", "--mock-trace", short, "--e2e-trace", pair[1])
    assert ran.code == 3
    assert "2 mock region(s), 3 needed" in " ".join(ran.out.split())


def test_a_phase_can_be_chosen(opkit: Opkit, pair: tuple[Path, Path]) -> None:
    words = ("--mock-trace", pair[0], "--e2e-trace", pair[1], "--phase", "context", "--json")
    assert set(json.loads(opkit("align", "dsa", *words).out)["phases"]) == {"context"}


def test_files_may_be_packed(opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path) -> None:
    packed = tmp_path / "mock.sqlite.gz"
    packed.write_bytes(gzip.compress(pair[0].read_bytes()))
    assert opkit("align", "dsa", "--mock-trace", packed, "--e2e-trace", pair[1]).code == 0


# Bad traces: each writes the file it is given and returns it.


def text_file(path: Path) -> Path:
    path.write_text("not a database, but long enough to look at")
    return path


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def empty_sqlite(path: Path) -> Path:
    db = sqlite3.connect(path)
    db.executescript("CREATE TABLE t (a); DROP TABLE t;")
    db.close()
    return path


def other_sqlite(path: Path) -> Path:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE songs (title TEXT)")
    db.close()
    return path


def edited(path: Path, script: str) -> Path:
    db = sqlite3.connect(make_export(path))
    db.executescript(script)
    db.close()
    return path


def no_kernels(path: Path) -> Path:
    return edited(path, f"DROP TABLE {KERNEL}; DROP TABLE NVTX_EVENTS;")


def no_kernel_rows(path: Path) -> Path:
    return edited(path, f"DELETE FROM {KERNEL};")


def nvtx_only(path: Path) -> Path:
    return edited(path, f"DROP TABLE {KERNEL}; DROP TABLE CUPTI_ACTIVITY_KIND_RUNTIME;")


def graph_level(path: Path) -> Path:
    table = "CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER);"
    return edited(path, f"DROP TABLE {KERNEL}; {table}")


def truncated(path: Path) -> Path:
    whole = make_export(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def missing(path: Path) -> Path:
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def damaged_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(make_export(path).read_bytes())[:-200])
    return path


BAD_TRACES = [
    (text_file, "not an SQLite file"),
    (empty_file, "the file is empty"),
    (empty_sqlite, "without any table"),
    (other_sqlite, "not an nsys export"),
    (no_kernels, "no GPU kernels in this export (no GPU activity)"),
    (no_kernel_rows, "the kernel table is empty"),
    (nvtx_only, "no GPU kernels in this export"),
    (graph_level, "--cuda-graph-trace=graph"),
    (truncated, "truncated"),
    (missing, "no such file"),
    (folder, "a folder, not a trace"),
    (damaged_gzip, "gzip file is damaged"),
]


@pytest.mark.parametrize("side", ["mock", "e2e"])
@pytest.mark.parametrize(("make", "sentence"), BAD_TRACES, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_trace_is_one_sentence(
    opkit: Opkit,
    pair: tuple[Path, Path],
    tmp_path: Path,
    make: Callable[[Path], Path],
    sentence: str,
    side: str,
) -> None:
    bad = make(tmp_path / "bad.sqlite")
    files = {"mock": pair[0], "e2e": pair[1], side: bad}
    ran = opkit("align", "dsa", "--mock-trace", files["mock"], "--e2e-trace", files["e2e"])
    assert ran.code == EXIT_BAD_INPUT
    complaint = ran.complaint()
    assert complaint.startswith(f"{bad}: ")
    assert sentence in complaint
    assert not (tmp_path / "opkit-out").exists()


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.6, 0.8, 0.9, 0.99])
def test_a_trace_cut_anywhere_never_passes(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    whole = pair[1].read_bytes()
    cut = tmp_path / "cut.sqlite"
    cut.write_bytes(whole[: int(len(whole) * share)])
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", cut)
    assert ran.code == EXIT_BAD_INPUT
    assert str(cut) in ran.complaint()


@pytest.mark.usefixtures("no_nsys")
def test_a_report_needs_nsys(opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = tmp_path / "run.nsys-rep"
    report.write_bytes(b"a report of nsys")
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", report)
    assert ran.code == EXIT_TOOL_MISSING
    assert "nsys was not found" in ran.complaint()


def test_an_engine_without_labels_is_told(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = shutil.copy(pair[1], tmp_path / "unlabelled.sqlite")
    db = sqlite3.connect(other)
    with db:
        db.execute("DELETE FROM NVTX_EVENTS WHERE text LIKE 'execute_%'")
    db.close()
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", other)
    assert ran.code == EXIT_BAD_INPUT
    assert "no forward step is labelled" in ran.complaint()


def test_an_engines_trace_is_no_mocks_trace(opkit: Opkit, pair: tuple[Path, Path]) -> None:
    ran = opkit("align", "dsa", "--mock-trace", pair[1], "--e2e-trace", pair[1])
    assert ran.code == EXIT_BAD_INPUT
    assert "no kernel was launched inside an `opkit dsa …` range" in ran.complaint()


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["align", "dsb", "--recorded"], EXIT_BAD_INPUT, "unknown op 'dsb'; known: dsa"),
        (["status", "dsb"], EXIT_BAD_INPUT, "unknown op 'dsb'; known: dsa"),
        (["align"], EXIT_USAGE, "Missing argument 'OP'"),
        (["align", "dsa"], EXIT_USAGE, "nothing to align"),
        (["align", "dsa", "--mock-trace", "x"], EXIT_USAGE, "--mock-trace is compared with an"),
        (["align", "dsa", "--strict-trace", "x"], EXIT_USAGE, "--mock-trace is compared with an"),
        (["align", "dsa", "--e2e-trace", "x"], EXIT_BAD_INPUT, "x: no such file"),
        (["align", "dsa", "--recorded", "--e2e-cmd", "x"], EXIT_USAGE, "exclude each other"),
        (["align", "dsa", "--e2e-cmd", "x", "--regions", "nvtx"], EXIT_USAGE, "--regions"),
        (["align", "dsa", "--strict", "--mock-trace", "m", "--e2e-trace", "e"], EXIT_USAGE,
         "--strict compares files only with --strict-trace"),
        (["align", "dsa", "--e2e-cmd", "a | b"], EXIT_BAD_INPUT, "uses the shell's '|'"),
        (["align", "dsa", "--e2e-cmd", "x", "--requests", "4"], EXIT_BAD_INPUT, "not a wave"),
        (["align", "dsa", "--e2e-cmd", "x", "--engine", "y"], EXIT_BAD_INPUT, "y: not a known"),
        (["align", "dsa", "--e2e-cmd", "x", "--url", "host:80"], EXIT_BAD_INPUT, "not a server's"),
        (["align", "dsa", "--e2e-cmd", "x", "--backend", "tgi"], EXIT_BAD_INPUT,
         "no mock of dsa for 'tgi'; known: vllm"),
        (["align", "dsa", "--iterations", "0"], EXIT_USAGE, "--iterations"),
        (["align", "dsa", "--duration", "-1"], EXIT_USAGE, "--duration"),
        (["align", "dsa", "--mode", "sideways"], EXIT_USAGE, "'sideways' is not one of"),
        (["align", "dsa", "--no-such-option"], EXIT_USAGE, "No such option"),
        (["frobnicate"], EXIT_USAGE, "No such command"),
        (["trace", "slim", "missing.sqlite", "out.sqlite"], EXIT_BAD_INPUT, "missing.sqlite"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_sentence(
    opkit: Opkit, words: list[str], code: int, sentence: str
) -> None:
    ran = opkit(*words)
    assert sentence in ran.complaint()
    assert ran.code == code


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        ("latency = ", "not a readable policy"),
        ("latencies = 0.1", "unknown key 'latencies'"),
        ("latency = 1.5", "hard ceiling"),
        ("latency = 'much'", "must be a number"),
        ("latency = -0.1", "must not be negative"),
        (None, "not a readable policy"),
    ],
)
def test_bad_policy_is_one_sentence(
    opkit: Opkit, tmp_path: Path, policy: str | None, sentence: str
) -> None:
    if policy is not None:
        (tmp_path / "policy.toml").write_text(policy)
    ran = opkit("align", "dsa", "--recorded", "--policy", "policy.toml")
    assert sentence in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT


def test_a_policy_changes_the_verdict(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text("min_regions = 1000")
    words = ("--mock-trace", pair[0], "--e2e-trace", pair[1], "--policy", "policy.toml")
    assert opkit("align", "dsa", *words).code == 3


def test_status_of_an_empty_folder_names_the_next_step(opkit: Opkit, tmp_path: Path) -> None:
    ran = opkit("status")
    assert ran.code == 0
    assert ran.out.startswith("No verdicts yet.")
    assert "opkit align dsa --recorded" in ran.out
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_ledger_is_told(opkit: Opkit, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("not a database, but long enough to look at")
    ran = opkit("status", "--out", tmp_path)
    assert "not an opkit ledger" in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT


def test_a_report_is_shown_even_when_it_cannot_be_recorded(
    opkit: Opkit, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is tried before, and may be gone after."""
    monkeypatch.setattr(Ledger, "try_out", lambda _ledger: None)
    (tmp_path / "file").touch()
    words = ("--mock-trace", pair[0], "--e2e-trace", pair[1], "--out", "file")
    ran = opkit("align", "dsa", *words)
    assert " PASS " in ran.out
    assert ran.code == EXIT_BAD_INPUT
    assert ran.said()[-2].startswith("opkit: file: ")


@pytest.mark.parametrize("words", [["--json"], []], ids=["json", "terminal"])
def test_a_reader_that_has_gone_changes_no_exit_code(
    pair: tuple[Path, Path], tmp_path: Path, words: list[str]
) -> None:
    eager = mock(eager=True).write(tmp_path / "eager.sqlite")
    for file, code in ((pair[0], 0), (eager, 1)):
        read, write = os.pipe()
        os.close(read)
        traces = ["--mock-trace", str(file), "--e2e-trace", str(pair[1])]
        try:
            done = subprocess.run(
                [*PROGRAM, "align", "dsa", *traces, *words],
                stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                env=environment(), timeout=60, check=False,
            )  # fmt: skip
        finally:
            os.close(write)
        assert done.returncode == code
        assert "BrokenPipe" not in done.stderr
        assert "Traceback" not in done.stderr


def test_the_program_itself_ends_with_the_exit_code(tmp_path: Path) -> None:
    ran = run_program("align", "dsa", "--mock-trace", "x.sqlite", cwd=tmp_path)
    assert ran.code == EXIT_USAGE
    assert ran.complaint().startswith("--mock-trace is compared with an --e2e-trace")
    shown = run_program(cwd=tmp_path)
    assert "Commands:" in shown.out + shown.err


def test_help_needs_no_input() -> None:
    for words in (["--help"], ["align", "--help"], ["status", "-h"], ["trace", "slim", "-h"]):
        shown = CliRunner().invoke(cli, words)
        assert shown.exit_code == 0
        assert "Usage:" in shown.output


def test_an_error_of_opkit_itself_is_no_verdict(
    opkit: Opkit, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("opkit.align.options.judge", broken)
    ran = opkit("align", "dsa", "--mock-trace", pair[0], "--e2e-trace", pair[1])
    assert ran.code == 70
    assert "ZeroDivisionError" in ran.err
    assert ran.err.splitlines()[-1].startswith("opkit: this is a bug in opkit")
