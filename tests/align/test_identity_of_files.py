"""Every file that is judged is a recording of its own, of the engine that was asked for."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_runs import run_main
from made_pair import engine, mock, session

from opkit.align import options as asked
from opkit.align.judge import Question, judge
from opkit.align.result import AlignResult, Method, Outcome
from opkit.cli_align import align
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE, BadInput
from opkit.layers.dsa import DSA
from opkit.layers.op import Phase
from opkit.layers.registry import find_op
from opkit.nsys_parsers.ranks import Recording

TRACES = Path(__file__).parents[1] / "traces"
VLLM = TRACES / "vllm"
RECORDED = TRACES.parents[1] / "opkit" / "recorded"


def says(path: Path, **said: Any) -> Path:
    """The export whose manifest says something else."""
    with closing(sqlite3.connect(path)) as db:
        (text,) = db.execute("SELECT value FROM OPKIT_MANIFEST WHERE key = 'manifest'").fetchone()
        text = json.dumps({**json.loads(text), **said})
        db.execute("UPDATE OPKIT_MANIFEST SET value = ? WHERE key = 'manifest'", (text,))
        db.commit()
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return mock().write(tmp_path / "mock.sqlite"), engine().write(tmp_path / "e2e.sqlite")


# One recording, one file.


def copied(how: str, path: Path, folder: Path) -> Path:
    if how == "itself":
        return path
    copy = folder / ("other.sqlite" if how == "unzipped" else "other.sqlite.gz")
    copy.write_bytes(gzip.decompress(path.read_bytes()) if how == "unzipped" else path.read_bytes())
    return copy


@pytest.mark.parametrize("how", ["itself", "renamed", "unzipped"])
def test_a_recording_given_twice_does_not_double_the_evidence(how: str, tmp_path: Path) -> None:
    """Its regions would be counted twice: an inconclusive case of 2 regions passed with 4."""
    one = VLLM / "qwen3-made-e2e.sqlite.gz"
    question = Question(find_op("gqa"), VLLM / "gqa-made-mock.sqlite.gz", (one,))
    assert judge(question).verdict is Outcome.INCONCLUSIVE
    twice = dataclasses.replace(question, e2e=(one, copied(how, one, tmp_path)))
    with pytest.raises(BadInput, match="given twice" if how == "itself" else "same recording"):
        judge(twice)


@pytest.mark.parametrize("known", [True, False])
def test_a_part_of_a_recording_is_no_other_rank(known: bool) -> None:
    """Slimming keeps the session's start and the process; without the start only all tells."""
    epoch = 1_790_000_000_000_000_000 if known else None
    whole = Recording(Path("e2e.sqlite"), epoch, ((7, 100, 0, 900),))
    part = Recording(Path("slim.sqlite"), epoch, ((7, 40, 100, 300),))
    assert whole.same(part) is known
    assert whole.same(dataclasses.replace(whole, path=Path("copy.sqlite")))
    later = dataclasses.replace(whole, epoch_ns=1_790_000_000_000_000_001)
    assert whole.same(later) is not known
    assert not whole.same(dataclasses.replace(whole, processes=((8, 100, 0, 901),)))


def test_the_mocks_recording_is_not_the_engines(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copy(pair[0], tmp_path / "copy.sqlite"))
    for e2e in (pair[0], copy):
        with pytest.raises(BadInput, match=r"given twice|same recording"):
            judge(Question(DSA, pair[0], (e2e,)))


def test_real_ranks_of_one_run_are_two_recordings() -> None:
    ranks = [TRACES / f"h200-rank{number}.sqlite.gz" for number in range(2)]
    mock_path = RECORDED / "dsa-vllm-h100-mock.sqlite.gz"
    read = judge(Question(DSA, mock_path, tuple(ranks))).provenance["files"]
    assert [file["name"] for file in read[1:]] == [path.name for path in ranks]


# One framework.


@pytest.mark.parametrize("side", [0, 1])
def test_a_backend_that_a_file_contradicts_is_refused(side: int, pair: tuple[Path, Path]) -> None:
    says(pair[1 - side], backend="sglang")
    with pytest.raises(BadInput) as refused:
        judge(Question(DSA, pair[0], (pair[1],), backend="sglang"))
    assert str(refused.value) == (f"{pair[side]} is a recording of vllm, and --backend says sglang")


def test_a_backend_that_the_files_confirm_or_do_not_know_is_taken(pair: tuple[Path, Path]) -> None:
    assert judge(Question(DSA, pair[0], (pair[1],), backend="vllm")).verdict is Outcome.PASS
    says(pair[1], backend="torch")  # a program that opkit does not know
    assert judge(Question(DSA, pair[0], (pair[1],), backend="vllm")).verdict is Outcome.PASS


def test_a_mock_that_names_no_backend_takes_the_engines(pair: tuple[Path, Path]) -> None:
    says(pair[0], backend="")
    says(pair[1], backend="sglang")
    assert judge(Question(DSA, pair[0], (pair[1],))).backend == "sglang"


def test_ranks_of_two_frameworks_are_not_of_one_run(tmp_path: Path) -> None:
    ours = mock().write(tmp_path / "mock.sqlite")
    ranks = [session(engine(), n).write(tmp_path / f"rank{n}.sqlite") for n in range(2)]
    says(ranks[1], backend="sglang")
    with pytest.raises(BadInput, match="not ranks of one run"):
        judge(Question(DSA, ours, tuple(ranks)))


@pytest.fixture(scope="module")
def strangers() -> AlignResult:
    """SGLang's mock beside vLLM's engine."""
    files = TRACES / "dsa-sglang-pair-mock.sqlite.gz", (TRACES / "wrong-e2e.sqlite.gz",)
    return judge(Question(DSA, *files))


def test_another_framework_is_named_first(strangers: AlignResult) -> None:
    assert strangers.verdict is Outcome.FAIL
    for phase in strangers.phases:
        evidence = phase.checks[0]
        assert evidence.outcome is Outcome.INCONCLUSIVE
        assert evidence.detail.startswith("mock sglang 0.5.14, E2E vllm 0.24.0; ")
        assert "one framework" in evidence.cause


def test_another_framework_is_the_cause_of_all_that_differs(strangers: AlignResult) -> None:
    for phase in strangers.phases:
        bad = [check for check in phase.checks[1:] if check.outcome is not Outcome.PASS]
        assert {"names", "counts"} <= {check.check for check in bad}
        assert {check.cause for check in bad} == {"follows from the other framework (see evidence)"}


def test_a_version_that_is_unknown_is_left_out(pair: tuple[Path, Path]) -> None:
    says(pair[1], backend="sglang", versions={})
    result = judge(Question(DSA, pair[0], (pair[1],)))
    assert "mock vllm, E2E sglang" in result.phases[0].checks[0].detail
    assert result.verdict is not Outcome.PASS


# Module ranges only.


def test_regions_by_module_ranges_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """In a late window graph nodes carry no module: by force, generation is found by no other."""
    result = judge(Question(DSA, pair[0], (pair[1],), method=Method.LAUNCH_NVTX))
    context, generation = result.phases
    assert (context.verdict, context.method) == (Outcome.PASS, Method.LAUNCH_NVTX)
    assert (generation.verdict, generation.method) == (Outcome.INCONCLUSIVE, None)
    assert "e2e.sqlite: --regions nvtx, and no module range" in generation.checks[0].detail
    early = engine(from_start=True).write(tmp_path / "early.sqlite")
    result = judge(Question(DSA, pair[0], (early,), method=Method.LAUNCH_NVTX))
    found = {phase.phase: phase.method for phase in result.phases}
    assert found == {Phase.CONTEXT: Method.LAUNCH_NVTX, Phase.GENERATION: Method.NODE_NVTX}
    assert result.verdict is Outcome.PASS


# What a run is told, a recording cannot hear.


def test_defaults_of_a_run_are_the_command_lines() -> None:
    own = align.make_context("align", ["dsa"]).params
    told = asked.OF_A_MOCK | asked.OF_AN_ENGINE
    assert {name: own[name] for name in told} == told


LIVE = [
    ("--requests", "1x0"), ("--window", "process"), ("--mode", "program"), ("--model", "m"),
    ("--iterations", "5"), ("--layer", "1"), ("--engine", "vllm"), ("--seed", "1"),
    ("--url", "http://x:1"), ("--ranks", "2"), ("--delay", "1"), ("--duration", "1"),
    ("--ready-limit", "1"),
]  # fmt: skip


@pytest.mark.parametrize("files", ["--recorded", "--mock-trace m --e2e-trace e"])
@pytest.mark.parametrize("words", LIVE, ids=[words[0] for words in LIVE])
def test_options_of_a_run_are_refused_for_files(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, str],
    files: str,
) -> None:
    ran = run_main(capsys, monkeypatch, "align", "dsa", *files.split(), *words)
    assert ran.complaint() == f"{words[0]} is for a run, and recordings are only compared"
    assert ran.code == EXIT_USAGE


@pytest.mark.parametrize("words", ["--window process", "--delay 1 --mode program"])
def test_options_of_the_engines_run_are_refused_for_its_recording(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    ran = run_main(capsys, monkeypatch, "align", "dsa", "--e2e-trace", "e", *words.split())
    assert "for a run, and recordings are read as they are" in ran.complaint()
    assert ran.code == EXIT_USAGE


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--strict", EXIT_USAGE, "--strict runs a second mock or compares its trace, and "
         "--recorded has none"),
        ("--backend sglang", EXIT_BAD_INPUT, "is a recording of vllm, and --backend says sglang"),
    ],
)  # fmt: skip
def test_the_bundled_recording_is_what_it_is(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    code: int,
    said: str,
) -> None:
    ran = run_main(capsys, monkeypatch, "align", "dsa", "--recorded", *words.split())
    assert said in ran.complaint()
    assert ran.code == code


def test_a_run_is_not_asked_for_another_engine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--e2e-cmd", "vllm serve m", "--backend", "sglang")
    ran = run_main(capsys, monkeypatch, "align", "dsa", *words)
    assert ran.complaint() == "the command serves with vllm, and --backend says sglang"
    assert ran.code == EXIT_USAGE


def test_a_recorded_engine_is_no_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--e2e-trace", VLLM / "qwen3-made-e2e.sqlite.gz", "--backend", "sglang")
    ran = run_main(capsys, monkeypatch, "align", "gqa", *words)
    assert "is a recording of vllm, and --backend says sglang" in ran.complaint()
    assert ran.code == EXIT_BAD_INPUT
