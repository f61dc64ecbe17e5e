"""Messages name the file that was asked for, in words; output folders are tried before the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Ran, run_main
from made_pair import engine, mock

from opkit import cli, cli_align
from opkit.errors import EXIT_BAD_INPUT

ROOT = Path(cli.__file__).parents[1]
ALIGNED = ROOT / "tests" / "traces" / "collected" / "dsa-h100-alignment.json.gz"
E2E = ROOT / "opkit" / "recorded" / "dsa-vllm-h100-e2e.sqlite.gz"
NOWHERE = Path("/proc")  # nobody may make a file there, root included
Opkit = Callable[..., Ran]


@pytest.fixture
def opkit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """Runs ``opkit WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_main(capsys, monkeypatch, *words)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """The options that give a mock's trace and the engine's, which agree."""
    made = tmp_path_factory.mktemp("pair")
    traces = mock().write(made / "mock.sqlite"), engine().write(made / "e2e.sqlite")
    return "--mock-trace", traces[0], "--e2e-trace", traces[1]


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (("report", ALIGNED, "--html", NOWHERE / "x.html"), NOWHERE / "x.html"),
        (("trace", "kernels", E2E, "--no-cache", "--parquet", NOWHERE / "k"), NOWHERE / "k"),
        (("trace", "summary", E2E, "--no-cache", "--perfetto", NOWHERE / "k"), NOWHERE / "k"),
        (("trace", "slim", E2E, NOWHERE / "s.sqlite"), NOWHERE / "s.sqlite"),
        (("trace", "kernels", E2E, "--no-cache", "--parquet", "no/k"), "no/k"),
    ],
)
def test_a_file_that_cannot_be_written(
    opkit: Opkit, words: tuple[object, ...], target: Path
) -> None:
    ran = opkit(*words)
    assert ran.code == EXIT_BAD_INPUT
    said = ran.complaint()
    assert said.startswith(f"{target}: ")
    assert said.lower().endswith(
        ("no such file or directory)", "no such file or directory", "no such folder as no")
    )
    assert ".part" not in ran.err
    assert "/.x" not in ran.err


def test_no_policy_of_that_name(opkit: Opkit, pair: tuple[object, ...]) -> None:
    ran = opkit("align", "dsa", *pair, "--policy", "nope.toml")
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint() == "nope.toml: not a readable policy (No such file or directory)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"phases": None}, "a part of it has another form"),
        ({"phases": {"context": {}}}, "verdict is missing"),
        ({"verdict": "maybe"}, "'maybe' is not a valid Outcome"),
        ({"backend": 7}, "backend is 7"),
        ({"provenance": {"versions": "0.24.0"}}, "provenance: versions"),
        ({"notes": [None]}, "notes is null"),
    ],
)
def test_a_damaged_result_is_told_in_words(
    opkit: Opkit, change: dict[str, Any], sentence: str
) -> None:
    stored = json.loads(opkit("report", ALIGNED, "--json").out)
    Path("x.json").write_text(json.dumps(stored | change))
    ran = opkit("report", "x.json")
    assert ran.complaint() == f"x.json: a damaged alignment report ({sentence})"


def test_an_output_folder_is_tried_before_anything_is_judged(
    opkit: Opkit, pair: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_args: object) -> None:
        raise AssertionError("judged")

    monkeypatch.setattr(cli_align.asked, "answer", never)
    Path("file").write_text("")
    for out in (NOWHERE / "x", Path("file"), Path("file/below")):
        ran = opkit("align", "dsa", *pair, "--out", out)
        assert ran.code == EXIT_BAD_INPUT
        assert ran.complaint().startswith(f"{out}: cannot be written (")
        assert ran.err.endswith("  --out names another folder\n")


def test_the_bundled_recording_needs_no_output_folder(opkit: Opkit) -> None:
    assert opkit("align", "dsa", "--recorded", "--out", NOWHERE / "x").code == 0


def test_status_holds_data_and_a_report_keeps_its_order(
    opkit: Opkit, pair: tuple[object, ...]
) -> None:
    judged = json.loads(opkit("align", "dsa", *pair, "--json").out)
    status = json.loads(opkit("status", "--json").out)
    entry = status["entries"][0]
    assert status["schema"] == "opkit.status/2"
    for name in ("policy", "files"):
        assert entry[name] == judged["provenance"][name]
    for name in ("policy", "dtypes", "layer_source"):
        assert isinstance(entry[name], dict)
    again = opkit("report", "--json").out
    assert list(json.loads(again)["provenance"]) == list(judged["provenance"])
    assert json.dumps(json.loads(again)) == json.dumps(judged)


def test_what_lists_the_others_is_true_for_each_kind(opkit: Opkit) -> None:
    for number in range(8):
        run = Path("opkit-out/bench") / f"bench-{number}"
        run.mkdir(parents=True)
        (run / "summary.json").write_text("{}")
        made = Path("opkit-out/collect") / f"op-{number}"
        made.mkdir(parents=True)
        (made / "run.json").write_text("{}")
    said = opkit("report", "nothing").err
    assert "bench-2 and 2 more (folders in opkit-out/bench)" in said
    assert "op-5 and 2 more (`opkit status --out opkit-out`)" in said
