"""`opkit new`: what it writes is sound as it is; what it refuses leaves nothing behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import opkit
from opkit.errors import BadInput
from opkit.layers.registry import NAMES
from opkit.layers.skeleton import new
from opkit.layers.skeleton.new import LONGEST, REGISTRY, write_op

ROOT = Path(opkit.__file__).parents[1]
SHORT, LONG = "rn", "a" * 11 + "_" + "9" * (LONGEST - 12)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small one: the registry alone, and the folders that are written into."""
    (tmp_path / REGISTRY).parent.mkdir(parents=True)
    shutil.copy(ROOT / REGISTRY, tmp_path / REGISTRY)
    (tmp_path / "tests" / "layers").mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with new ops in it."""
    folder = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "recorded")
    shutil.copytree(ROOT / "opkit", folder / "opkit", ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, title in ((SHORT, ""), (LONG, "t" * 60), ("norm_linear", "Norm, then a product")):
        write_op(name, folder, title)
    return folder


def ran(folder: Path, *words: str) -> str:
    """What a module of this interpreter says in ``folder``, which must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text("utf-8") if path.is_file() else ""
        for path in folder.rglob("*")
    }


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
@pytest.mark.parametrize("name", [SHORT, LONG, "norm_linear"])
def test_ruff_finds_nothing(whole: Path, name: str) -> None:
    files = [f"opkit/layers/{name}", f"tests/layers/test_{name}.py", str(REGISTRY)]
    ran(whole, "ruff", "check", *files)
    ran(whole, "ruff", "format", "--check", *files)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_finds_nothing(whole: Path) -> None:
    said = ran(whole, "mypy", "-p", "opkit.layers.norm_linear", "-p", "opkit.layers.registry")
    assert "no issues found" in said


def test_its_own_tests_pass(whole: Path) -> None:
    words = ("-o", "addopts=", "-p", "no:cacheprovider", "tests/layers/test_norm_linear.py")
    here = importlib.util.find_spec("torch") is not None
    said = ran(whole, "pytest", *words)
    assert ("7 passed" if here else "4 passed, 3 skipped") in said


def test_the_new_op_is_known_to_the_commands(whole: Path) -> None:
    said = ran(whole, "opkit", "layers", "--json")
    assert '"op": "norm_linear"' in said
    assert f'"op": "{LONG}"' in said


def test_one_line_is_added_to_the_registry(checkout: Path) -> None:
    before = (checkout / REGISTRY).read_text().splitlines()
    written = write_op("norm_linear", checkout)
    after = (checkout / REGISTRY).read_text().splitlines()
    assert [line for line in after if line not in before] == ['    "norm_linear",']
    assert len(after) == len(before) + 1
    assert all((checkout / path).is_file() for path in written.files)
    assert "norm_linear: Norm linear" in (checkout / "docs/op-norm_linear.md").read_text()


def test_the_title_is_where_a_reader_looks(checkout: Path) -> None:
    write_op("norm_linear", checkout, "norm, then a product")
    text = (checkout / "opkit/layers/norm_linear/__init__.py").read_text()
    assert text.startswith('"""Norm, then a product.\n')
    assert 'title="Norm, then a product"' in text
    assert "$" not in text.replace('MODULE$")', "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "cannot be an op's name"),
        ("x", "cannot be an op's name"),
        ("torch", "is a backend's name"),
        ("Norm", "cannot be an op's name"),
        ("norm-linear", "cannot be an op's name"),
        ("norm linear", "cannot be an op's name"),
        ("../norm", "cannot be an op's name"),
        ("9norm", "cannot be an op's name"),
        ("norm_", "cannot be an op's name"),
        ("norm__x", "cannot be an op's name"),
        ("lambda", "cannot be an op's name"),
        ("größe", "cannot be an op's name"),
        ("n" * (LONGEST + 1), "cannot be an op's name"),
        *((name, f"there is an op {name} already") for name in NAMES),
    ],
)
def test_a_bad_name_is_one_sentence_and_nothing_written(
    checkout: Path, name: str, said: str
) -> None:
    before = tree(checkout)
    with pytest.raises(BadInput) as caught:
        write_op(name, checkout)
    assert said in str(caught.value)
    assert tree(checkout) == before


@pytest.mark.parametrize(
    "taken",
    [
        "opkit/layers/plan.py",
        "opkit/layers/check/__init__.py",
        "tests/layers/test_plan.py",
        "tests/collect/test_check.py",
        "docs/op-check.md",
    ],
)
def test_what_is_there_is_never_overwritten(checkout: Path, taken: str) -> None:
    (checkout / taken).parent.mkdir(parents=True, exist_ok=True)
    (checkout / taken).write_text("mine")
    before = tree(checkout)
    name = "plan" if "plan" in taken else "check"
    with pytest.raises(BadInput, match="is there already"):
        write_op(name, checkout)
    assert tree(checkout) == before


@pytest.mark.parametrize("title", ['a "b"', "a\nb", "t" * 61, "back\\slash"])
def test_a_title_that_breaks_the_files_is_refused(checkout: Path, title: str) -> None:
    before = tree(checkout)
    with pytest.raises(BadInput, match="cannot be a title"):
        write_op("norm_linear", checkout, title)
    assert tree(checkout) == before


def test_a_folder_that_is_no_checkout_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a checkout of opkit"):
        write_op("norm_linear", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_registry_of_another_form_is_told(checkout: Path) -> None:
    (checkout / REGISTRY).write_text("NAMES = []\n")
    before = tree(checkout)
    with pytest.raises(BadInput, match="no list NAMES"):
        write_op("norm_linear", checkout)
    assert tree(checkout) == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device", "x"),
                                     KeyboardInterrupt()])  # fmt: skip
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_failure_on_the_way_leaves_nothing_behind(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, at: int
) -> None:
    before = tree(checkout)
    real, calls = Path.write_text, 0

    def write_text(path: Path, text: str, encoding: str | None = None) -> int:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            real(path, text[:10], encoding)
            raise failure
        return real(path, text, encoding)

    monkeypatch.setattr(new.Path, "write_text", write_text)
    with pytest.raises((BadInput, KeyboardInterrupt)):
        write_op("norm_linear", checkout)
    monkeypatch.undo()
    assert tree(checkout) == before
