"""What a server's interpreter imports of opkit: exactly this opkit, without its neighbours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import opkit

INSIDE = Path(opkit.__file__).parent / "inside"


def run(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with an interpreter that has no opkit but what PYTHONPATH gives it."""
    return subprocess.run(
        [sys.executable, "-S", "-c", code],  # -S: no site-packages, as in another environment
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(INSIDE)},
        timeout=60,
    )


def test_the_hook_factory_is_found_without_opkit_being_installed(tmp_path: Path) -> None:
    code = (
        "import opkit_in_server as o, sys; print(o.step_ranges.__module__, "
        "sys.modules['opkit'].__file__)"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    module, file = done.stdout.split()
    assert module == "opkit.layers.backends.sglang.labels"
    assert Path(file) == Path(opkit.__file__).resolve()


def test_what_lies_beside_opkit_stays_hidden(tmp_path: Path) -> None:
    done = run("import opkit_in_server as o; o.step_ranges; import duckdb", tmp_path)
    assert "No module named 'duckdb'" in done.stderr


def test_an_unknown_name_is_no_attribute(tmp_path: Path) -> None:
    done = run("import opkit_in_server as o; print(hasattr(o, 'nothing'))", tmp_path)
    assert done.stdout.strip() == "False"
