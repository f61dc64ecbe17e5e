"""Tables laid out for aiconfigurator, and the proof that it reads them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest
from made_rows import (
    about,
    dsa_row,
    grid,
    installed_aiconfigurator,
    measured,
    write_shipped,
)
from made_systems import fake_aiconfigurator

from opkit.collect.install.estimate import (
    Aiconfigurator,
    Estimate,
    command_of,
    estimate,
    find_aiconfigurator,
    read_estimate,
)
from opkit.collect.install.overlay import Place
from opkit.collect.install.proof import Installed, install, judge, scale
from opkit.collect.install.questions import Question
from opkit.collect.tables.provenance import head_of
from opkit.collect.tables.write import write_tables
from opkit.errors import BadInput, RunFailed, ToolMissing
from opkit.layers.dsa import DSA
from opkit.layers.op import Op, Table

VERSION = "data/h100_sxm/sparse_attention/vllm/0.24.0"
CONTEXT = f"{VERSION}/dsa_context_module_perf.parquet"
GENERATION = f"{VERSION}/dsa_generation_module_perf.parquet"
PLACE = Place("h100_sxm", "sparse_attention", "vllm", "0.24.0")


# --- the output ---

PRINTED = """\
  Backend:          vllm (0.24.0)
Latency Summary
  ttft               1521.665 ms     477.680 ms    31.4%

Context phase (total = 1521.665 ms, SOL = 477.680 ms, SOL% = 31.4%)
  op                                 latency            SOL     SOL%  share (%)             source
  context_attention               738.783 ms     190.212 ms    25.7%  ██████   48.6%  [silicon]
  context_moe_pre_dispatch          0.000 ms      55.719 ms    94.9%  ░░░░░░    3.9%  [silicon]
  ... (others, 2 items)             1.250 ms      55.719 ms    94.9%  ░░░░░░    3.9%

Generation phase (total = 13037.675 ms)
  generation_attention      7742.631 ms  59.4%  ███████  [silicon]

Context energy (total = 0.000 W·ms, avg P = 0.0 W)
  context_attention    99.000 W·ms
"""


def test_the_operations_are_read_and_nothing_else() -> None:
    found = read_estimate(PRINTED)
    assert found == Estimate(
        "0.24.0",
        {
            "context_attention": 738.783,
            "context_moe_pre_dispatch": 0.0,
            "... (others, 2 items)": 1.25,
            "generation_attention": 7742.631,
        },
    )
    with pytest.raises(BadInput, match="not the output"):
        read_estimate("Error: no data")


# --- the judgement ---

BEFORE = {"context_attention": 100.0, "context_moe": 30.0, "generation_attention": 13.286}
QUESTION = Question("dsa_context_module", None, (), r"context_attention")


def judged(after: dict[str, float], version: str = "0.24.0", factor: float = 1.5) -> Any:
    before = Estimate("0.24.0", BEFORE)
    return judge(QUESTION, PLACE, factor, (), before, Estimate(version, {**BEFORE, **after}))


def test_the_proof_holds_when_only_the_op_changes_by_the_factor() -> None:
    proof = judged({"context_attention": 150.001})  # as far as printed digits tell
    assert proof.holds
    assert "100.000 → 150.001 ms (× 1.5000)" in proof.sentence
    assert [entry.name for entry in proof.scaled] == ["context_attention"]
    assert len(proof.entries) == 3


@pytest.mark.parametrize(
    ("after", "version", "said"),
    [
        ({}, "0.24.0", "dsa_context_module is not read"),
        ({"context_attention": 150.002}, "0.24.0", "rows of another source are mixed in"),
        ({"context_attention": 125.0}, "0.24.0", "rows of another source are mixed in"),
        ({"context_attention": 150.0, "context_moe": 30.001}, "0.24.0", "does not feed changed"),
        ({"context_attention": 150.0, "generation_attention": 19.929}, "0.24.0", "does not feed"),
        ({"context_attention": 150.0, "new_op": 1.0}, "0.24.0", "does not feed changed too"),
        ({"context_attention": 150.0}, "0.22.0", "not 0.24.0"),
    ],
)
def test_the_proof_does_not_hold_otherwise(
    after: dict[str, float], version: str, said: str
) -> None:
    before = Estimate(version, BEFORE)
    proof = judge(QUESTION, PLACE, 1.5, (), before, Estimate(version, {**BEFORE, **after}))
    assert not proof.holds
    assert said in proof.sentence


def test_an_operation_too_short_to_tell_proves_nothing() -> None:
    before, after = (Estimate("0.24.0", {"context_attention": ms}) for ms in (0.002, 0.003))
    assert not judge(QUESTION, PLACE, 1.5, (), before, after).holds


def test_of_several_operations_one_is_enough_and_mixed_ones_are_told() -> None:
    question = Question("gemm", None, (), r".*_gemm")
    before = Estimate("0.24.0", {"context_qkv_gemm": 10.0, "context_ffn2_gemm": 20.0, "moe": 5.0})
    after = Estimate("0.24.0", {"context_qkv_gemm": 15.0, "context_ffn2_gemm": 27.0, "moe": 5.0})
    proof = judge(question, PLACE, 1.5, (), before, after)
    assert proof.holds
    assert [entry.name for entry in proof.partly] == ["context_ffn2_gemm"]
    assert "× 1.3500" in proof.sentence


def test_an_estimate_without_the_operation_is_told() -> None:
    question = Question("gemm", None, (), r".*_gemm")
    same = Estimate("0.24.0", {"moe": 5.0})
    assert "no operation that gemm could feed" in judge(
        question, PLACE, 1.5, (), same, same
    ).sentence  # fmt: skip


def test_scaling_changes_the_latency_and_nothing_else(tables: Path) -> None:
    path = tables / "dsa_context_module_perf.parquet"
    before = duckdb.read_parquet(str(path))
    names, types, rows = before.columns, before.types, before.fetchall()
    scale(path, 1.5)
    after = duckdb.read_parquet(str(path))
    assert (after.columns, after.types) == (names, types)
    place = names.index("latency")
    expected = [(*row[:place], row[place] * 1.5, *row[place + 1 :]) for row in rows]
    assert after.fetchall() == expected
    assert [p.name for p in tables.iterdir() if p.name.startswith(".")] == []


# --- all of it, with a fake aiconfigurator ---


def installed(tmp_path: Path, tables: Path, **changed: Any) -> Installed:
    given: dict[str, Any] = {"aiconfigurator": sys.executable, **changed}
    return install(DSA, tables, tmp_path / "root", "h100_sxm", **given)


def test_install_proves_both_tables(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    said: list[str] = []
    found = installed(tmp_path, tables, say=said.append)
    assert found.ok
    assert found.aiconfigurator == "0.12.0"
    assert found.place == PLACE
    assert found.tables == {"dsa_context_module": 12, "dsa_generation_module": 12}
    assert [proof.table for proof in found.proofs] == list(found.tables)
    assert [proof.layers for proof in found.proofs] == pytest.approx([61, 61], rel=1e-4)
    for proof, name in zip(found.proofs, ("context", "generation"), strict=True):
        assert [entry.name for entry in proof.scaled] == [f"{name}_attention"]
        assert proof.scaled[0].ratio == pytest.approx(1.5, rel=1e-4)
        assert proof.command[:3] == ("aiconfigurator", "cli", "estimate")
        assert str(tmp_path / "root") in proof.command
    assert len([text for text in said if "estimating" in text]) == 3  # one of them for both
    # The overlay itself is left unscaled.
    table = tmp_path / "root" / CONTEXT
    assert table.read_bytes() == (tables / "dsa_context_module_perf.parquet").read_bytes()


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("deaf", "is not read"),
        ("leaky", "does not feed changed too: context_moe"),
        ("blend", "rows of another source are mixed in"),
        ("other version", "used vllm 0.22.0, not 0.24.0"),
    ],
)
def test_an_estimator_that_does_otherwise_is_found_out(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch, mode: str, said: str
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_MODE", mode)
    found = installed(tmp_path, tables)
    assert not found.ok
    assert said in found.proofs[0].sentence


def test_an_estimate_that_fails_is_told_with_its_words(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_MODE", "fails")
    with pytest.raises(RunFailed, match="Error: perf database error: MoE data missing"):
        installed(tmp_path, tables)


def test_without_the_proof_nothing_is_run(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    monkeypatch.setenv("FAKE_MODE", "fails")
    found = installed(tmp_path, tables, prove=False)
    assert (found.ok, found.proofs) == (True, ())


def test_what_is_silently_filled_is_said(
    tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    (note,) = installed(tmp_path, tables, prove=False).notes
    assert "come from the installed ones of vllm 0.24.0" in note
    notes = installed(tmp_path, tables, prove=False, fill=False, version="0.25.0").notes
    assert [text.split(":")[0] for text in notes[:2]] == [
        "with this folder aiconfigurator takes the highest version that it finds",
        "aiconfigurator brings nothing for vllm 0.25.0",
    ]
    assert "no estimate says which" in notes[2]


def test_tables_of_torch_must_be_given_a_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    torch = about(backend="torch", head=head_of("torch", "2.11.0", "NVIDIA H100 80GB HBM3"))
    write_tables(DSA, grid(), torch, tmp_path / "torch")
    with pytest.raises(BadInput, match="aiconfigurator has no tables of torch"):
        installed(tmp_path, tmp_path / "torch", prove=False)
    with pytest.raises(BadInput, match=r"TORCH 2\.11\.0 is no version of vllm"):
        installed(tmp_path, tmp_path / "torch", prove=False, backend="vllm")
    found = installed(tmp_path, tmp_path / "torch", prove=False, backend="vllm", version="0.24.0")
    assert found.place == PLACE


def test_bad_tables_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_aiconfigurator(tmp_path, monkeypatch)
    folder = tmp_path / "tables"
    folder.mkdir()
    with pytest.raises(BadInput, match="no tables of dsa"):
        installed(tmp_path, folder)
    path = folder / "dsa_context_module_perf.parquet"
    path.write_text("not parquet")
    with pytest.raises(BadInput, match="not a readable table"):
        installed(tmp_path, folder)
    duckdb.sql("SELECT 'VLLM' AS framework, '0.24.0' AS version, 1::FLOAT AS latency") \
        .write_parquet(str(path))  # fmt: skip
    with pytest.raises(BadInput, match="no column latency of type DOUBLE"):
        installed(tmp_path, folder)
    assert not (tmp_path / "root").exists()


def test_aiconfigurator_is_found_by_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = fake_aiconfigurator(tmp_path, monkeypatch)
    program = tmp_path / "bin" / "aiconfigurator"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("OPKIT_AICONFIGURATOR", raising=False)
    assert find_aiconfigurator() == Aiconfigurator(sys.executable, "0.12.0", systems)
    program.write_text("#!/bin/sh\n'''exec' python\n")  # what pip writes for a long path
    (program.parent / "python").symlink_to(sys.executable)
    assert find_aiconfigurator().systems == systems
    monkeypatch.setenv("OPKIT_AICONFIGURATOR", str(tmp_path / "gone"))
    with pytest.raises(ToolMissing, match="gone was not found"):
        find_aiconfigurator()


def test_an_interpreter_without_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(ToolMissing, match="has no aiconfigurator"):
        find_aiconfigurator(sys.executable)


# --- the real one ---

OURS = (
    "architecture = 'DeepseekV32ForCausalLM' AND gemm_type = 'bfloat16' "
    "AND kv_cache_dtype = 'bfloat16' AND num_heads = 16 AND isl IN (1, 512, 1024, 4096)"
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Aiconfigurator, Path]:
    """The installed aiconfigurator, and a part of its DSA rows as opkit's tables."""
    tool = installed_aiconfigurator()
    tables = tmp_path_factory.mktemp("real") / "tables"
    write_shipped(tool, tables, OURS)
    return tool, tables


def test_aiconfigurator_reads_opkit_s_tables(
    real: tuple[Aiconfigurator, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, tables = real
    # It then refuses a table that the metadata does not cover.
    monkeypatch.setenv("AIC_STRICT_PROVENANCE", "1")
    found = install(DSA, tables, tmp_path / "root", "h100_sxm", aiconfigurator=tool.python)
    assert [proof.sentence for proof in found.proofs if not proof.holds] == []
    context, generation = found.proofs
    assert [entry.name for entry in context.scaled] == ["context_attention"]
    assert [entry.name for entry in generation.scaled] == ["generation_attention"]
    # DeepSeek-V3.2 has 61 layers, and each takes what our row says.
    assert [context.layers, generation.layers] == pytest.approx([61, 61], rel=1e-4)
    assert len(context.entries) > 10


def test_aiconfigurator_fills_what_was_not_collected_from_its_own(
    real: tuple[Aiconfigurator, Path], tmp_path: Path
) -> None:
    """32 heads are not in these tables: with the fill the estimate is the installed one's."""
    tool, tables = real
    shape = ("--batch-size", "4", "--isl", "1024", "--osl", "2", "--estimate-mode", "static")
    arguments = [
        "--model-path", "deepseek-ai/DeepSeek-V3.2", *shape, "--tp-size", "4", "--moe-tp-size", "1",
        "--moe-ep-size", "4", "--gemm-quant-mode", "bfloat16", "--kvcache-quant-mode", "bfloat16",
        "--system", "h100_sxm", "--backend", "vllm", "--backend-version", "0.24.0", "--detail",
        "all", "--systems-paths",
    ]  # fmt: skip
    before = estimate(tool, [*arguments, "default"]).entries
    for fill in (True, False):
        root = tmp_path / f"fill-{fill}"
        install(DSA, tables, root, "h100_sxm", aiconfigurator=tool.python, fill=fill, prove=False)
        after = estimate(tool, [*arguments, str(root)]).entries
        assert (after == before) is fill


def test_a_version_of_its_own_is_read_too(
    real: tuple[Aiconfigurator, Path], tmp_path: Path
) -> None:
    tool, tables = real
    found = install(
        DSA, tables, tmp_path / "root", "h100_sxm", aiconfigurator=tool.python, version="0.24.9"
    )
    assert found.ok
    assert "--backend-version 0.24.9" in " ".join(found.notes)
    assert "0.24.9" in found.proofs[0].command


def test_aiconfigurator_reads_a_gemm_table_of_torch(
    real: tuple[Aiconfigurator, Path], tmp_path: Path
) -> None:
    tool, _ = real
    gemm = Op(
        "gemm", "matrix products", (), {},
        tables={"": Table("gemm", "gemm", ("gemm_dtype", "m", "n", "k"), {"torch": "torch"})},
    )  # fmt: skip
    source = tool.systems / "data/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"
    found = duckdb.sql(
        f"SELECT m, n, k, latency FROM '{source}' WHERE gemm_dtype = 'bfloat16' "
        "AND (n, k) IN ((10240, 5120), (5120, 8192)) AND m IN (1, 2, 1024, 4096)"
    ).fetchall()
    rows = [
        replace(
            dsa_row(1, 1, 0, ms),
            key=f"{m}-{n}-{k}",
            table="gemm",
            columns={"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k},
            measurement=replace(measured(ms), elapsed_ms=(ms,) * 8),
        )
        for m, n, k, ms in found
    ]
    head = head_of("torch", "2.11.0", "NVIDIA H100 80GB HBM3")
    written = write_tables(gemm, rows, about(backend="torch", head=head), tmp_path / "tables")
    assert written.tables[0].rows == 8
    made = install(
        gemm, tmp_path / "tables", tmp_path / "root", "h100_sxm",
        backend="vllm", version="0.24.0", aiconfigurator=tool.python,
    )  # fmt: skip
    (proof,) = made.proofs
    assert proof.holds, proof.sentence
    names = {entry.name for entry in proof.scaled}
    assert {"context_qkv_gemm", "context_proj_gemm"} <= names
    assert "context_gate_ffn1_gemm" not in names  # its shape is not in our table


def test_a_command_is_what_a_user_types() -> None:
    assert command_of(["--isl", "1"]) == ["aiconfigurator", "cli", "estimate", "--isl", "1"]
