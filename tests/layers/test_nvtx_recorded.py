"""For real: a mock's ranges, recorded by nsys on a machine without a GPU, and read back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cli_runs import environment
from profile_bench import needs_nsys

from opkit.layers import nvtx
from opkit.layers.manifest import manifest_from_json, sidecar_of
from opkit.layers.op import Case, LaunchMode, MockRange, Phase, parse_mock_range
from opkit.layers.plan import Plan, PlannedCase
from opkit.nsys_parsers import ranges
from opkit.nsys_parsers.export import Export, TraceFacts, _columns, attach, connect
from opkit.nsys_parsers.strings import load_strings
from opkit.nsys_parsers.tool import export_sqlite, find_nsys

pytest.importorskip("torch", reason="torch is not installed: make test-torch")
pytest.importorskip("nvtx", reason="the package nvtx is not installed")

MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 256, "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
CASES = (Case(Phase.CONTEXT, 2, 16, 0), Case(Phase.GENERATION, 2, 1, 16))


def texts(sqlite: Path) -> list[str]:
    """Every range's text, in order, by the joins of ``nsys_parsers``."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory()
    with Export(TraceFacts(sqlite), sqlite, _columns(sqlite), Path(folder.name), folder) as export:
        db = connect(export.scratch)
        try:
            attach(db, export)
            load_strings(db, export.columns)
            ranges.build(db, export.columns)
            return [row[0] for row in db.execute("SELECT text FROM nvtx ORDER BY start").fetchall()]
        finally:
            db.close()


@needs_nsys
def test_every_iteration_is_in_the_recording(tmp_path: Path) -> None:
    nsys = find_nsys()
    if problem := nvtx.recorded_problem(nsys.version, nvtx.nvtx_version()):
        pytest.skip(problem)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    report = tmp_path / "mock.nsys-rep"
    planned = tuple(PlannedCase(case, LaunchMode.EAGER) for case in CASES)
    plan = Plan(
        "gqa", "torch", str(tmp_path), planned, str(sidecar_of(report)),
        warmup=2, iterations=3, context_pause_ms=0,
    )  # fmt: skip
    plan.write(tmp_path / "plan.json")
    program = [sys.executable, "-m", "opkit.layers.drive", str(tmp_path / "plan.json")]
    subprocess.run(
        [str(nsys.path), "profile", "-t", "nvtx", "--sample=none", "--cpuctxsw=none",
         "-o", str(report.with_suffix("")), *program],
        env={**environment(), nvtx.NSYS_VERSION: nsys.version},
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    found = [read for text in texts(export_sqlite(report)) if (read := parse_mock_range(text))]
    assert found == [
        MockRange("gqa", case, LaunchMode.EAGER, iteration)
        for case in CASES
        for iteration in range(3)
    ]
    manifest = manifest_from_json(sidecar_of(report).read_text(), "manifest")
    assert "2 warm-up and 3 measured iterations" in manifest.recipe["pacing"]
