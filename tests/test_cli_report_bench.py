"""`opkit report` of a benchmark: read back whole, shown as `opkit bench` showed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from cli_runs import Ran, run_main

from opkit.bench.files import write_summary
from opkit.bench.read import bench_from_json
from opkit.bench.result import Bench, Context, Failure, Row
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE, BadInput
from opkit.reports.bench import render_bench

Opkit = Callable[..., Ran]
NAME = "bench-20261121T103000Z"


@pytest.fixture
def opkit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """Runs ``opkit WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_main(capsys, monkeypatch, *words)


def made() -> Bench:
    """A benchmark of one row in which every key has a value of its type, and one failure."""
    values: dict[Any, Any] = {str: "x", int: 3, float: 2.5, bool: False}
    hints = get_type_hints(Row)
    row = {
        item.name: (7, 8) if str(hints[item.name]).startswith("tuple[int")
        else ("note",) if str(hints[item.name]).startswith("tuple")
        else values.get(hints[item.name], 4)
        for item in fields(Row)
    }  # fmt: skip
    return Bench(
        opkit="0.1.0",
        started="2026-11-21T10:30:00+00:00",
        folder=f"opkit-out/bench/{NAME}",
        models=[Context("m", "vllm", "0.24.0", "engine", {}, {"kind": "none"}, {"n": [128]})],
        rows=[Row(**row)],
        failures=[Failure("m", "vllm", "tg128", "the engine ended")],
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "opkit-out" / "bench" / NAME
    path.mkdir(parents=True)
    write_summary(path, made())
    return path


def test_what_was_written_is_read_back_whole() -> None:
    stored = json.loads(json.dumps(made().as_json()))
    assert bench_from_json(stored, "summary.json") == made()


@pytest.mark.parametrize("word", [NAME, f"opkit-out/bench/{NAME}"])
@pytest.mark.usefixtures("folder")
def test_a_benchmark_is_shown_by_name_and_folder(opkit: Opkit, word: str) -> None:
    for form in ([], ["--markdown"]):
        ran = opkit("report", word, *form)
        assert (ran.code, ran.out) == (0, render_bench(made(), "md"))
    data = json.loads(opkit("report", word, "--json").out)
    assert data == json.loads(json.dumps(made().as_json()))
    assert data["schema"] == "opkit.bench/1"


def test_what_a_benchmark_has_not_is_one_sentence(opkit: Opkit, folder: Path) -> None:
    page = opkit("report", NAME, "--html", "x.html")
    assert page.code == EXIT_USAGE
    assert f"{NAME} is a benchmark, which has no page" in page.complaint()
    pair = opkit("report", "--compare", NAME, folder)
    assert pair.code == EXIT_USAGE
    assert f"{NAME} is a benchmark and {NAME} is a benchmark" in pair.complaint()
    unknown = opkit("report", "nothing")
    assert unknown.code == EXIT_BAD_INPUT
    assert f"benchmarks in opkit-out: {NAME}" in unknown.err


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ({"schema": "opkit.align/1"}, "not a benchmark of schema opkit.bench/1"),
        ({"results": [{"model": "m"}]}, "a damaged benchmark"),
        ({"results": None}, "a damaged benchmark"),
    ],
)
def test_a_damaged_benchmark_is_told(damage: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        bench_from_json(made().as_json() | damage, "summary.json")
