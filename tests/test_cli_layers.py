"""`opkit layers`, `opkit check`, `opkit new`: options in, one report out, an exit code."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import Ran, run_main

import opkit
from opkit.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, EXIT_TOOL_MISSING, EXIT_USAGE
from opkit.layers.registry import BACKENDS, OPS

HERE = Path(__file__).parent
Opkit = Callable[..., Ran]


@pytest.fixture
def opkit_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """`opkit WORDS` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: run_main(capsys, monkeypatch, *words)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose check does what FAKE_CHECK says."""
    path = tmp_path / "bin" / "python"
    path.parent.mkdir()
    fake = (HERE / "layers" / "fake_check.py").read_text()
    path.write_text(f"#!{sys.executable}\n{fake}")
    path.chmod(0o755)
    return path


def test_layers_lists_every_mock(opkit_in: Opkit) -> None:
    ran = opkit_in("layers")
    assert ran.code == 0
    for name in (*OPS, *BACKENDS):
        assert name in ran.out
    assert ran.err == ""


def test_layers_as_json(opkit_in: Opkit) -> None:
    data = json.loads(opkit_in("layers", "--json").out)
    assert data["schema"] == "opkit.layers/1"
    assert len(data["mocks"]) == len(OPS) * len(BACKENDS)
    assert {"op", "backend", "phases", "state", "version", "reason", "fix"} <= set(data["mocks"][0])


def test_a_passed_check(opkit_in: Opkit, python: Path, tmp_path: Path) -> None:
    ran = opkit_in("check", "gqa", "--backend", "torch", "--python", python)
    assert ran.code == 0
    assert " PASS " in ran.out
    assert "Qwen3ForCausalLM" in ran.out
    assert "building" in ran.err
    (folder,) = (tmp_path / "opkit-out").iterdir()
    assert {"plan.json", "check.log", "result.json", "model"} == {p.name for p in folder.iterdir()}
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["op"], plan["backend"], plan["inputs"]) == ("gqa", "torch", "tokens")


def test_a_failed_check_has_its_own_exit_code(
    opkit_in: Opkit, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "fail")
    ran = opkit_in("check", "gqa", "--backend", "torch", "--python", python)
    assert ran.code == 1
    assert "next: the fix" in ran.out


def test_a_check_as_json(opkit_in: Opkit, python: Path) -> None:
    ran = opkit_in("check", "gqa", "--backend", "torch", "--python", python, "--json")
    data = json.loads(ran.out)
    assert (data["schema"], data["passed"]) == ("opkit.check/1", True)
    assert data["lines"][1]["numbers"]["context"]["relative_error"] == "inf"


def test_a_crash_shows_what_was_found_and_fails(
    opkit_in: Opkit, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "crash")
    ran = opkit_in("check", "gqa", "--backend", "torch", "--python", python)
    assert ran.code == EXIT_RUN_FAILED
    assert "✓  forward" in ran.out
    assert "at context 1 × 64: the process of the check was ended by SIGSEGV" in " ".join(
        ran.out.replace("┃", " ").split()
    )
    assert "opkit: the process of the check was ended by SIGSEGV" in ran.err


def test_a_refusal_of_the_mock_is_one_sentence(
    opkit_in: Opkit, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CHECK", "refuse")
    ran = opkit_in("check", "gqa", "--backend", "torch", "--python", python)
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint() == "the model has no experts"


def test_the_options_reach_the_plan(opkit_in: Opkit, python: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ["--backend", "torch", "--python", python, "--model", model, "--tp", 4, "--seed", 7]
    words += ["--serve-args", "--max-model-len 4096 --x 'a b'", "--inputs", "normal"]
    assert opkit_in("check", "mla", *words, "--out", "there").code == 0
    (folder,) = (tmp_path / "there").iterdir()
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["engine_args"] == ["--max-model-len", "4096", "--x", "a b"]
    assert (plan["tp_size"], plan["seed"], plan["inputs"]) == (4, 7, "normal")
    assert plan["model"] == str(model)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["check"], EXIT_USAGE, "Missing argument 'OP'"),
        (["check", "gqb"], EXIT_BAD_INPUT, "unknown op 'gqb'; known: dsa"),
        (["check", "gqa", "--backend", "tgi"], EXIT_BAD_INPUT, "no mock of gqa for 'tgi'"),
        (["check", "gqa", "--tp", "0"], EXIT_USAGE, "--tp"),
        (["check", "gqa", "--inputs", "guessed"], EXIT_USAGE, "--inputs"),
        (["check", "gqa", "--inputs", "captured"], EXIT_USAGE, "go together"),
        (["check", "gqa", "--captured", "x"], EXIT_USAGE, "go together"),
        (["check", "gqa", "--serve-args", "'a"], EXIT_USAGE, "No closing quotation"),
        (["check", "gqa", "--backend", "torch", "--model", "none"], EXIT_BAD_INPUT,
         "no config.json in it"),
        (["check", "gqa", "--python", "/no/python"], EXIT_TOOL_MISSING, "cannot be asked"),
        (["check", "gqa", "--limit", "0"], EXIT_USAGE, "--limit"),
        (["layers", "--python", "/no/python"], EXIT_TOOL_MISSING, "cannot be asked"),
        (["new"], EXIT_USAGE, "Missing argument 'OP'"),
        (["new", "Bad"], EXIT_BAD_INPUT, "'Bad' cannot be an op's name"),
        (["new", "rope"], EXIT_BAD_INPUT, "not a checkout of opkit"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_sentence(
    opkit_in: Opkit, words: list[str], code: int, sentence: str, tmp_path: Path
) -> None:
    ran = opkit_in(*words)
    assert sentence in ran.complaint()
    assert ran.code == code
    assert not (tmp_path / "opkit").exists()


def test_new_writes_into_a_checkout(opkit_in: Opkit, tmp_path: Path) -> None:
    registry = tmp_path / "fork" / "opkit" / "layers" / "registry.py"
    registry.parent.mkdir(parents=True)
    shutil.copy(Path(opkit.__file__).parent / "layers" / "registry.py", registry)
    ran = opkit_in("new", "rope", "--into", "fork", "--title", "rotary embedding")
    assert ran.code == 0
    assert "wrote  opkit/layers/rope/__init__.py" in ran.out
    assert (tmp_path / "fork" / "tests" / "layers" / "test_rope.py").is_file()
    assert '    "rope",\n' in registry.read_text()
    again = opkit_in("new", "rope", "--into", "fork")
    assert again.complaint() == "there is an op rope already"
