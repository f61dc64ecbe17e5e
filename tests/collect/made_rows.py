"""Made rows, measurements and tables without a GPU, and the rows of an installed aiconfigurator."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from opkit.collect.install.estimate import VARIABLE, Aiconfigurator, find_aiconfigurator
from opkit.collect.measurement import KernelTime, Measurement, Timing
from opkit.collect.tables.provenance import About, head_of
from opkit.collect.work import Fault, Row
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode
from opkit.sensors.state import GpuState

H100 = "NVIDIA H100 80GB HBM3"
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
NOISE = (1.0, 1.001, 0.999, 1.002, 0.998, 1.0005, 0.9995, 1.0)


def manifest(heads: int = 128) -> Manifest:
    """What a DSA mock of DeepSeek-V3.2 says of itself."""
    return Manifest(
        side="mock",
        op="dsa",
        backend="vllm",
        versions={"vllm": "0.24.0", "torch": "2.11.0"},
        model={
            "architecture": "DeepseekV32ForCausalLM",
            "num_heads": heads,
            "hidden_size": 7168,
            "index_topk": 2048,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        dtypes={"weights": "bfloat16", "activations": "bfloat16", "kv_cache": "bfloat16"},
        layer_source={"vllm/model_executor/models/deepseek_v2.py": "0" * 64},
    )


def measured(
    ms: float,
    gpu_ms: float | None = None,
    launch: LaunchMode = LaunchMode.GRAPH,
    **changed: Any,
) -> Measurement:
    """A measurement whose elapsed median is ``ms``, with a little noise."""
    made = Measurement(
        elapsed_ms=tuple(ms * factor for factor in NOISE),
        gpu_ms=() if gpu_ms is None else tuple(gpu_ms * factor for factor in NOISE),
        launch=launch,
        kernels=(KernelTime("void gemm<bf16, 128>(int, float*)", 2, 0.7 * 1e3 * ms),),
        timing=Timing(),
        warmups=3,
        stopped="spread",
        before=GpuState(1980, 2619, 40, 120.0),
        after=GpuState(1755, 2619, 46, 480.0),
    )
    return replace(made, **changed)


def dsa_row(
    batch: int,
    new: int,
    past: int,
    ms: float,
    *,
    heads: int = 128,
    measurement: Measurement | None = None,
    **changed: Any,
) -> Row:
    """A DSA row: of the generation table when one new token meets a cache, else of the context."""
    phase = "generation" if new == 1 and past else "context"
    made = Row(
        key=f"s-{phase}-{heads}-{batch}-{new}-{past}",
        group=f"dsa vllm {phase}",
        table=f"dsa_{phase}_module",
        columns={
            "model": "deepseek-ai/DeepSeek-V3.2",
            "architecture": "DeepseekV32ForCausalLM",
            "mla_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16",
            "gemm_type": "bfloat16",
            "num_heads": heads,
            "batch_size": batch,
            "isl": new,
            "tp_size": 1,
            "step": past,
        },
        case={"phase": phase, "batch": batch, "tokens": new, "past": past, "mode": "graph"},
        measurement=measurement or measured(ms, ms * 0.95),
        gpu={"name": H100, "uuid": "GPU-1", "index": 0},
        host="node1",
        created="2026-11-21T10:00:00+00:00",
        seconds=1.5,
        build=f"heads-{heads}",
    )
    return replace(made, **changed)


def failed_row(batch: int, new: int, past: int, fault: Fault, error: str) -> Row:
    """A DSA case that has no value."""
    return replace(dsa_row(batch, new, past, 1.0), measurement=None, fault=fault, error=error)


def grid() -> list[Row]:
    """Twelve context and twelve generation rows whose times grow as they should."""
    context = [
        dsa_row(batch, new, 0, 0.5 + batch * new / 600)
        for batch in (1, 2, 4)
        for new in (512, 1024, 2048, 4096)
    ]
    generation = [
        dsa_row(batch, 1, past, 0.3 + batch * 0.01 + past * 1e-5)
        for batch in (1, 2, 4)
        for past in (512, 1024, 2048, 4096)
    ]
    return context + generation


def about(**changed: Any) -> About:
    """What such rows share."""
    made = About(
        head=head_of("vllm", "0.24.0", H100),
        backend="vllm",
        model="deepseek-ai/DeepSeek-V3.2",
        verdict="dsa-20261121-103000-ab12cd",
        versions={"vllm": "0.24.0"},
        sweep="the grid of dsa",
        manifests={f"heads-{heads}": manifest(heads) for heads in HEADS},
    )
    return replace(made, **changed)


def installed_aiconfigurator() -> Aiconfigurator:
    """The aiconfigurator of this host; without one the test is skipped, and one that cannot be
    used fails it."""
    if VARIABLE not in os.environ and shutil.which("aiconfigurator") is None:
        pytest.skip(f"no aiconfigurator on PATH or in {VARIABLE}: make test-aiconfigurator")
    return find_aiconfigurator()


def shipped_rows(tool: Aiconfigurator, where: str) -> list[Row]:
    """Rows made from the DSA tables that aiconfigurator brings for h100_sxm and vLLM 0.24.0."""
    folder = tool.systems / "data/h100_sxm/sparse_attention/vllm/0.24.0"
    rows = []
    for table in DSA.tables.values():
        names = ("model", *table.columns[1:], "latency")
        with duckdb.connect() as db:
            found = (
                db.read_parquet(str(folder / f"{table.name}_perf.parquet"))
                .filter(where)
                .project(", ".join(names))
                .fetchall()
            )
        for values in found:
            told = dict(zip(names, values, strict=True))
            latency = told.pop("latency")
            heads = told["num_heads"]
            row = dsa_row(told["batch_size"], told["isl"], told["step"], latency, heads=heads)
            exact = replace(measured(latency), elapsed_ms=(latency,) * 8)
            key = f"{table.name}-{'-'.join(map(str, told.values()))}"
            rows.append(replace(row, key=key, table=table.name, columns=told, measurement=exact))
    return rows


def write_shipped(tool: Aiconfigurator, folder: Path, where: str) -> None:
    """Write such rows as opkit's tables."""
    from opkit.collect.tables.write import write_tables

    written = write_tables(DSA, shipped_rows(tool, where), about(), folder)
    assert len(written.tables) == 2
