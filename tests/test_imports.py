"""The rule of the house: which part of the package may import which, and what no part imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opkit

PACKAGE = Path(opkit.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Every part may import itself, ``opkit`` (the version) and ``opkit.errors``; beyond that:
ALLOWED = {
    "cli": {"align", "collect", "bench", "doctor", "reports", "layers", "nsys_parsers"},
    "__main__": {"cli"},
    # Results and ledger entries are plain data of align.
    "reports": {"align", "collect", "bench", "doctor", "layers", "nsys_parsers"},
    "collect": {"align", "layers", "nsys_parsers", "post_mortem", "sensors"},
    "bench": {"post_mortem", "sensors"},
    "doctor": {"layers", "nsys_parsers", "sensors"},
    "sensors": set(),
    "align": {"layers", "nsys_parsers", "post_mortem"},
    "layers": set(),
    "nsys_parsers": set(),
    "post_mortem": set(),
    "errors": set(),
    "__init__": set(),
}
# Of align, reports and collect may read only this: what an alignment found, as plain data, and the
# policy that it was judged by.
# Of nsys_parsers reports read only what a question's answer is.
ANSWERS = "opkit.nsys_parsers.views"
PLAIN_DATA = (
    "opkit.align.result",
    "opkit.align.result_json",
    "opkit.align.comparison",
    "opkit.align.ledger",
    "opkit.align.policy",
)
FRAMEWORKS = {"torch", "vllm", "tensorrt_llm", "sglang", "ray", "nvtx"}
# An op's file for a backend may import its framework; so may what a backend's mocks share.
BACKENDS = {"torch", "vllm", "sglang", "trtllm"}


def part_of(name: str) -> str:
    """The part of the package that ``layers/op.py`` or ``opkit.layers.op`` lies in."""
    if name == "opkit":
        return "__init__"
    part = name.removeprefix("opkit.").removesuffix(".py").replace("/", ".").split(".")[0]
    # The files of the command line.
    for suffix in (
        "_align",
        "_bench",
        "_check",
        "_collect",
        "_comm",
        "_doctor",
        "_layers",
        "_model",
        "_output",
        "_report",
        "_trace",
    ):
        part = part.removesuffix(suffix)
    return part


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules that the code imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            name = node.module or ""
            # `from opkit import errors` and `from opkit.align import run` import modules.
            below = [f"{name}.{alias.name}" for alias in node.names]
            modules = [full for full in below if is_module(full)]
            yield from modules or [name]


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def at_module_level(tree: ast.AST) -> Iterator[str]:
    """Modules imported when the module itself is: not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        yield from at_module_level(node)


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text("utf-8"))


def breaches(module: str, tree: ast.AST) -> list[str]:
    """The imports of ``module`` that the house forbids."""
    part = part_of(module)
    wrong = []
    for name in imported(tree):
        if name.split(".")[0] != "opkit":
            continue
        other = part_of(name)
        if other not in {part, "errors", "__init__"} | ALLOWED[part]:
            wrong.append(f"{module} imports {name}")
        if part in ("reports", "collect") and other == "align" and name not in PLAIN_DATA:
            wrong.append(f"{module} imports {name}, which is no plain data")
        if part == "reports" and other == "nsys_parsers" and not name.startswith(ANSWERS):
            wrong.append(f"{module} imports {name}, which is no answer")
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    assert breaches(module, parse(module)) == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("nsys_parsers/keep.py", "from opkit.layers.op import parse_mock_range"),
        ("nsys_parsers/keep.py", "def f():\n from opkit.align import judge"),
        ("layers/op.py", "import opkit.nsys_parsers.trace"),
        ("align/ledger.py", "from opkit.reports.terminal import print_align"),
        ("align/run.py", "from opkit import cli"),
        ("reports/terminal.py", "from opkit.nsys_parsers.trace import open_trace"),
        ("reports/terminal.py", "from opkit.align.judge import judge"),
        ("collect/run.py", "from opkit.align.judge import judge"),
        ("collect/run.py", "from opkit.reports.terminal import print_align"),
        ("align/run.py", "from opkit.collect.run import collect"),
    ],
)
def test_a_forbidden_import_is_found(module: str, code: str) -> None:
    assert len(breaches(module, ast.parse(code))) == 1


def backend(module: str) -> bool:
    """Whether it may import a framework: only a backend of ``layers``."""
    parts = Path(module).with_suffix("").parts
    if parts[:2] == ("layers", "backends"):
        return True
    return len(parts) == 3 and parts[0] == "layers" and parts[2] in BACKENDS


@pytest.mark.parametrize(
    ("module", "may"),
    [
        ("layers/gqa/torch.py", True),
        ("layers/dsa/trtllm.py", True),
        ("layers/backends/vllm/worker.py", True),
        ("layers/torch.py", False),
        ("layers/nvtx.py", False),
        ("layers/check/torch/deep.py", False),
        ("layers/gqa/__init__.py", False),
        ("align/torch.py", False),
    ],
)
def test_a_backend_is_known_by_its_place(module: str, may: bool) -> None:
    assert backend(module) is may


@pytest.mark.parametrize("module", [module for module in MODULES if not backend(module)])
def test_no_framework_at_module_level(module: str) -> None:
    roots = {name.split(".")[0] for name in at_module_level(parse(module))}
    assert not roots & FRAMEWORKS


def test_the_command_line_pulls_no_framework() -> None:
    code = "import sys, opkit, opkit.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(done.stdout.split())
    assert "opkit" in loaded
    assert not loaded & (FRAMEWORKS | {"transformers", "numpy", "pandas"})


def test_showing_a_stored_verdict_loads_no_numpy() -> None:
    """It takes longer to load than to show anything."""
    code = (
        "import sys; from pathlib import Path; from opkit.align.ledger import Ledger; "
        "import opkit.cli_report, opkit.reports.terminal; "
        "Ledger(Path('none.db')).entries(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not set(done.stdout.split()) & {
        "numpy",
        "pandas",
        "sqlite_utils",
        "matplotlib",
        "jinja2",
    }
