"""A made ``systems`` folder, and a fake aiconfigurator that reads it as the real one does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

META = """\
schema_version: 1
provenance: legacy
runtime: {framework: vllm, version: 0.24.0}
tables:
  dsa_context_module_perf: {status: complete}
  dsv4_csa_context_module_perf: {status: complete}
"""
QUERY = """\
defaults:
  vllm: {current: "0.24.0", previous: null}
overrides:
  a100_sxm:
    vllm: {current: "0.14.0", previous: null}
"""


def make_systems(root: Path) -> Path:
    """Two systems, three families, two backends; files whose text is their own path."""
    files = (
        "perf_data_reuse_manifest.yaml",
        "data/h100_sxm/gemm/vllm/0.24.0/gemm_perf.parquet",
        "data/h100_sxm/moe/vllm/0.24.0/moe_perf.parquet",
        "data/h100_sxm/sparse_attention/trtllm/1.0.0/dsa_context_module_perf.parquet",
        "data/h100_sxm/sparse_attention/vllm/0.22.0/dsa_context_module_perf.parquet",
        "data/h100_sxm/sparse_attention/vllm/0.24.0/dsa_context_module_perf.parquet",
        "data/h100_sxm/sparse_attention/vllm/0.24.0/dsv4_csa_context_module_perf.parquet",
        "data/a100_sxm/gemm/vllm/0.14.0/gemm_perf.parquet",
    )
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    for system in ("h100_sxm", "a100_sxm"):
        (root / f"{system}.yaml").write_text(f"# a system\ndata_dir: data/{system} # relative\n")
    (root / "query_versions.yaml").write_text(QUERY)
    meta = root / "data/h100_sxm/sparse_attention/vllm/0.24.0/collection_meta.yaml"
    meta.write_text(META)
    return root


FAKE = """
import argparse, os, sys
from pathlib import Path
import duckdb

def main(argv):
    parser = argparse.ArgumentParser()
    for name in ("systems-paths", "system", "backend", "backend-version", "detail", "isl", "osl",
                 "batch-size", "tp-size", "moe-tp-size", "moe-ep-size", "model-path", "prefix",
                 "estimate-mode", "gemm-quant-mode", "kvcache-quant-mode", "fmha-quant-mode"):
        parser.add_argument("--" + name, default="0")
    parser.add_argument("--no-color", action="store_true")
    given = parser.parse_args(argv[2:])
    mode = os.environ.get("FAKE_MODE", "")
    if mode == "fails":
        print("Error: perf database error: MoE data missing")
        return
    folder = Path(given.systems_paths, "data", given.system, "sparse_attention", given.backend,
                  given.backend_version)
    heads = 128 // int(given.tp_size)
    def look(table, isl, step):
        if mode == "deaf":
            return 1.0
        (value,) = duckdb.sql(
            f"SELECT latency FROM '{folder}/{table}_perf.parquet' WHERE num_heads = {heads} AND "
            f"batch_size = {given.batch_size} AND isl = {isl} AND step = {step}").fetchone()
        return value
    context = 61 * look("dsa_context_module", given.isl, 0)
    generation = 61 * look("dsa_generation_module", 1, given.isl)
    other = context / 7 if mode == "leaky" else 12.5
    if mode == "blend":
        context = (context + 100) / 2
    version = "0.22.0" if mode == "other version" else given.backend_version
    print(f"  Backend:          {given.backend} ({version})")
    print("Performance Summary")
    print(f"  tpot                {generation:>12.3f} ms")
    print()
    print(f"Context phase (total = {context + other:.3f} ms)")
    print("  op                                 latency            SOL     SOL%")
    print(f"  context_attention  {context:>10.3f} ms     190.212 ms    25.7%  [silicon]")
    print(f"  context_moe        {other:>10.3f} ms      44.504 ms     9.2%  [silicon]")
    print()
    print(f"Generation phase (total = {generation:.3f} ms)")
    print(f"  generation_attention  {generation:>10.3f} ms     987.833 ms  [silicon]")
    print()
    print("Context energy (total = 0.000 W·ms, avg P = 0.0 W)")
    print("  context_attention    99.000 W·ms")
"""


def fake_aiconfigurator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a fake where this interpreter finds it; return its ``systems`` folder."""
    package = folder / "site" / "aiconfigurator"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(FAKE)
    told = folder / "site" / "aiconfigurator-0.12.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: aiconfigurator\nVersion: 0.12.0\n")
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", path)
    return make_systems(package / "systems")


def tree(root: Path) -> dict[str, str]:
    """Every file of an overlay as a reader finds it: its text, or ``parquet``; links followed."""
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            path = Path(folder, name)
            content = path.read_bytes()
            text = "parquet" if content[:4] == b"PAR1" else content.decode()
            found[path.relative_to(root).as_posix()] = text
    return dict(sorted(found.items()))
