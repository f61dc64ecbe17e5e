"""The overlay of aiconfigurator's systems: links to its own, our tables in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_systems import make_systems, tree

from opkit.collect.install.overlay import MARK, Place, lay_out
from opkit.errors import BadInput

VERSION = "data/h100_sxm/sparse_attention/vllm/0.24.0"
CONTEXT = f"{VERSION}/dsa_context_module_perf.parquet"
GENERATION = f"{VERSION}/dsa_generation_module_perf.parquet"
PLACE = Place("h100_sxm", "sparse_attention", "vllm", "0.24.0")


def lay(root: Path, origin: Path, tables: Path, place: Place = PLACE, fill: bool = True) -> Any:
    files = {path.stem: path for path in tables.glob("*.parquet")}
    entries = yaml.safe_load((tables / "collection_meta.yaml").read_text())["tables"]
    return lay_out(root, origin, place, files, entries, fill=fill)


def test_the_overlay_is_the_installed_tree_with_our_tables_in_their_place(
    tmp_path: Path, tables: Path
) -> None:
    origin = make_systems(tmp_path / "systems")
    laid = lay(tmp_path / "root", origin, tables)
    assert laid.folder == tmp_path / "root" / VERSION
    assert laid.fills == ("dsa_context_module_perf",)  # there is no installed generation table
    assert (laid.queryable, laid.shipped) == (True, True)
    before, after = tree(origin), tree(tmp_path / "root")
    assert after[CONTEXT] == after[GENERATION] == "parquet"
    shipped = "data/h100_sxm/sparse_attention/vllm/_shipped-0.24.0"
    own = {
        MARK, CONTEXT, GENERATION, f"{VERSION}/collection_meta.yaml", f"{VERSION}/reuse.yaml",
        f"{VERSION}/opkit/dsa_context_module_perf.provenance.json",
        f"{VERSION}/opkit/dsa_generation_module_perf.provenance.json",
    }  # fmt: skip
    same = {name: text for name, text in after.items() if name not in own}
    expected = {name: text for name, text in before.items() if name not in own}
    filled = {name.replace(VERSION, shipped): t for name, t in before.items() if VERSION in name}
    assert same == expected | filled
    # Nothing was copied but our own files.
    links = [p for p in (tmp_path / "root").rglob("*") if p.is_file() and not p.is_symlink()]
    real = {p.relative_to(tmp_path / "root").as_posix() for p in links}
    assert {name for name in real if not _below_a_link(tmp_path / "root", name)} == own


def _below_a_link(root: Path, name: str) -> bool:
    return any((root / parent).is_symlink() for parent in Path(name).parents)


def test_the_installed_tree_is_not_touched(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    before = tree(origin)
    lay(tmp_path / "root", origin, tables)
    lay(tmp_path / "root", origin, tables, fill=False)
    assert tree(origin) == before


def test_the_metadata_covers_every_table_of_the_folder(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    folder = lay(tmp_path / "root", origin, tables).folder
    meta = yaml.safe_load((folder / "collection_meta.yaml").read_text())
    assert meta["provenance"] == "legacy"  # of the others
    assert set(meta["tables"]) == {path.stem for path in folder.glob("*.parquet")}
    assert meta["tables"]["dsa_context_module_perf"]["rows"] == 12
    assert meta["tables"]["dsv4_csa_context_module_perf"] == {"status": "complete"}


def test_metadata_of_schema_2_stays_of_schema_2(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    (origin / VERSION / "collection_meta.yaml").write_text(
        "schema_version: 2\nruntime: {framework: vllm, version: 0.24.0}\ntables: {}\n"
    )
    folder = lay(tmp_path / "root", origin, tables).folder
    told = yaml.safe_load((folder / "collection_meta.yaml").read_text())
    entry = told["tables"]["dsa_context_module_perf"]
    assert set(entry) == {"rows", "status", "collections"}
    assert set(entry["collections"][0]) == {
        "collector_ref", "collector_hash", "case_plan_hash", "collected_at", "rows", "status",
    }  # fmt: skip


def test_missing_rows_come_from_the_installed_table_or_not(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    folder = lay(tmp_path / "root", origin, tables).folder
    (entry,) = yaml.safe_load((folder / "reuse.yaml").read_text())["reuse"]
    assert entry["table"] == "dsa_context_module_perf"
    donor = folder.parent / entry["from_version"] / "dsa_context_module_perf.parquet"
    assert donor.read_text() == CONTEXT  # the installed one
    assert entry["from_version"].startswith("_")  # aiconfigurator lists no such version
    assert all(isinstance(entry[k], str) and entry[k] for k in ("reason", "approved_by"))
    laid = lay(tmp_path / "root", origin, tables, fill=False)
    assert laid.fills == ()
    assert not (folder / "reuse.yaml").exists()
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith("_")] == []


def test_reuse_that_is_installed_stays(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    installed = {
        "schema_version": 1,
        "reuse": [
            {"table": "dsa_context_module_perf", "from_version": "0.30.0", "reason": "r",
             "approved_by": "a"}
        ],
    }  # fmt: skip
    (origin / VERSION / "reuse.yaml").write_text(yaml.safe_dump(installed))
    folder = lay(tmp_path / "root", origin, tables).folder
    lay(tmp_path / "root", origin, tables)
    found = yaml.safe_load((folder / "reuse.yaml").read_text())["reuse"]
    assert [entry["from_version"] for entry in found] == ["_shipped-0.24.0", "0.30.0"]


def test_a_version_that_aiconfigurator_does_not_list_needs_its_list_gone(
    tmp_path: Path, tables: Path
) -> None:
    origin = make_systems(tmp_path / "systems")
    laid = lay(tmp_path / "root", origin, tables, replace(PLACE, version="0.25.0"))
    assert (laid.queryable, laid.shipped, laid.fills) == (False, False, ())
    assert not (tmp_path / "root" / "query_versions.yaml").exists()
    assert (tmp_path / "root" / CONTEXT).read_text() == CONTEXT  # 0.24.0 as installed


def test_two_installs_share_an_overlay(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    lay(tmp_path / "root", origin, tables)
    other = tmp_path / "gemm"
    other.mkdir()
    (other / "gemm_perf.parquet").write_bytes(b"PAR1 made")
    (other / "collection_meta.yaml").write_text("tables: {gemm_perf: {status: complete}}")
    lay(tmp_path / "root", origin, other, replace(PLACE, family="gemm"))
    found = tree(tmp_path / "root")
    assert found["data/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"] == "parquet"
    assert found[CONTEXT] == "parquet"
    assert found["data/h100_sxm/moe/vllm/0.24.0/moe_perf.parquet"].startswith("data/h100_sxm/moe")


def test_what_an_update_of_aiconfigurator_adds_appears(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    lay(tmp_path / "root", origin, tables)
    (origin / "data/h100_sxm/mla").mkdir()
    (origin / "data/h100_sxm/mla/new.parquet").write_text("new")
    lay(tmp_path / "root", origin, tables)
    assert (tmp_path / "root/data/h100_sxm/mla/new.parquet").read_text() == "new"


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    root = tmp_path / "root"
    root.mkdir()
    (root / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput, match="not empty and no overlay"):
        lay(root, origin, tables)
    assert [path.name for path in root.iterdir()] == ["thesis.txt"]
    with pytest.raises(BadInput, match="within the installed systems folder"):
        lay(origin / "mine", origin, tables)
    lay(tmp_path / "good", origin, tables)
    other = make_systems(tmp_path / "other")
    with pytest.raises(BadInput, match="overlays"):
        lay(tmp_path / "good", other, tables)


def test_an_unknown_system_is_told_with_those_that_are(tmp_path: Path, tables: Path) -> None:
    origin = make_systems(tmp_path / "systems")
    with pytest.raises(BadInput, match=r"known: a100_sxm, h100_sxm$"):
        lay(tmp_path / "root", origin, tables, replace(PLACE, system="h900"))
    assert not (tmp_path / "root").exists()
