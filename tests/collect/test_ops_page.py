"""docs/ops.md says of every op what its definition says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from opkit.collect.sweep import phases_of, read_sweep
from opkit.layers.op import Op
from opkit.layers.registry import OPS

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text("utf-8")


def section(name: str) -> str:
    """What the page says below the heading of an op."""
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section on {name}"
    return found[1]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_tables_columns_and_shares(op: Op) -> None:
    text = section(op.name)
    words = {table.name for table in op.tables.values()} | set(op.shares)
    words |= {table.family for table in op.tables.values()}
    words |= {column for table in op.tables.values() for column in table.columns}
    assert [word for word in sorted(words) if f"`{word}`" not in text] == []


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_region_is_what_the_patterns_find(op: Op) -> None:
    text = section(op.name)
    row = next(line for line in text.splitlines() if line.startswith("| region |"))
    modules = [word for word in re.findall(r"`([\w.]+)`", row) if word != "layers.N"]
    assert modules
    for module in modules:
        path = "layers.3." + module.removeprefix("layers.N.")
        for pattern in op.region.values():
            found = re.search(pattern.module, f"model.{path}")
            assert found is not None, path
            assert found["layer"] == "3"


def numbers(op: Op) -> set[int]:
    """The largest value of every parameter of an op's grid, and how many values those have."""
    cases = [vars(case) for case in read_sweep(op).cases]
    found = set()
    for phase in phases_of(op):
        own = [case for case in cases if not phase or str(case["phase"]) == phase]
        for name in own[0]:
            values = {case[name] for case in own if isinstance(case[name], int)}
            if values - {0, 1}:
                found |= {max(values)} if phase else {max(values), len(values)}
    return found


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.name != "mla"])  # says: as dsa
def test_the_sweep_is_what_the_grid_has(op: Op) -> None:
    said = re.search(r"\*\*Sweep\*\*:(.*?)\n\n", section(op.name), flags=re.DOTALL)
    assert said is not None
    assert numbers(op) <= {int(w.replace(",", "")) for w in re.findall(r"\d[\d,]*", said[1])}


def test_the_shown_sweep_is_one(tmp_path: Path) -> None:
    shown = re.search(r"replaces the grid:\n\n((?:    .*\n)+)", PAGE)
    assert shown is not None
    text = re.sub(r"^    ", "", shown[1], flags=re.MULTILINE)
    grids = tomllib.loads(text)
    file = tmp_path / "sweep.toml"
    for op in OPS.values():
        own = {phase or op.name for phase in phases_of(op)}
        blocks = re.split(r"^(?=\[)", text, flags=re.MULTILINE)
        kept = [b for b in blocks[1:] if re.match(r"\[(\w+)\]", b)[1] in own]  # type: ignore[index]
        file.write_text(blocks[0] + "".join(kept))
        assert read_sweep(op, file).tp == tuple(grids["tp"])
