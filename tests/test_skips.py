"""What was not tested is told with its reason, without an option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_gpu(number):
    pytest.skip("no GPU")

def test_module():
    pytest.importorskip("no_such_module", reason="no such module")

def test_runs():
    pass
"""


def run_pytest(tests: str, folder: Path) -> str:
    """The output of a run with nothing but the plugin."""
    (folder / "test_made.py").write_text(tests)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "skips", "-p", "no:cacheprovider"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


def test_reasons_are_told_once_with_their_number(tmp_path: Path) -> None:
    said = run_pytest(TESTS, tmp_path)
    assert "not tested here" in said
    lines = said.splitlines()
    assert lines.count("   3  no GPU") == 1
    assert lines.count("   1  no such module") == 1


def test_nothing_is_told_where_all_was_tested(tmp_path: Path) -> None:
    assert "not tested" not in run_pytest("def test_runs(): pass", tmp_path)
