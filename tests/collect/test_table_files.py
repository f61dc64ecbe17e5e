"""Whose files are written over, and what a full disk or a cut leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from made_rows import about, dsa_row, grid
from made_tables import read_parquet, write

from opkit.collect.tables import files as table_files
from opkit.collect.tables.provenance import head_of
from opkit.collect.tables.write import write_tables
from opkit.errors import BadInput
from opkit.layers.dsa import DSA
from opkit.layers.op import Phase


def test_opkit_overwrites_its_own_files(tmp_path: Path) -> None:
    write(tmp_path, grid())
    slower = [dsa_row(1, 1024, 0, 9.0)]
    written = write(tmp_path, slower)
    assert [row["latency"] for row in read_parquet(written.tables[0].parquet)] == [9.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "collection_meta.yaml",
        *(
            f"dsa_{phase}_module_perf.{suffix}"
            for phase in ("context", "generation")
            for suffix in ("parquet", "provenance.json", "txt")
        ),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "dsa_context_module_perf.parquet",
        "dsa_context_module_perf.txt",
        "dsa_context_module_perf.provenance.json",
        "collection_meta.yaml",
    ],
)
def test_nobody_else_s_file_is_overwritten_unless_forced(tmp_path: Path, name: str) -> None:
    write(tmp_path, grid())
    other = tmp_path / name
    other.write_text("schema_version: 1\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadInput, match=f"{name}: not as opkit wrote it"):
        write(tmp_path, grid())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_tables(DSA, grid(), about(), tmp_path, force=True)
    assert other.read_bytes() != before[other]


def test_tables_of_two_versions_do_not_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, grid())
    with pytest.raises(BadInput, match=r"holds tables of vllm 0\.24\.0, not of vllm 0\.25\.0"):
        write(tmp_path, grid(), head=head_of("vllm", "0.25.0", "NVIDIA H200"))


def test_a_full_disk_leaves_the_old_tables_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, grid())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(table_files, "_sync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        write(tmp_path, [dsa_row(1, 1024, 0, 9.0)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_cut_off_between_two_files_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, grid())
    real, calls = os.replace, []

    def cut(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, [dsa_row(1, 1024, 0, 9.0)])
    monkeypatch.undo()
    assert len(calls) == 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    written = write(tmp_path, [dsa_row(1, 1024, 0, 7.0)])
    assert [row["latency"] for row in read_parquet(written.tables[0].parquet)] == [7.0]


def test_every_phase_of_dsa_has_its_table() -> None:
    assert {phase: table.name for phase, table in DSA.tables.items()} == {
        Phase.CONTEXT: "dsa_context_module",
        Phase.GENERATION: "dsa_generation_module",
    }
