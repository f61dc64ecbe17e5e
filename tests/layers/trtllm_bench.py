"""Plans, models and the fake TensorRT-LLM that the tests of its mocks share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trtllm_fakes import install
from trtllm_paper import Fake

import opkit
from opkit.layers.mock import Mock
from opkit.layers.op import AnyCase, Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.registry import build_mock, find_op

MODELS = Path(opkit.__file__).parent / "layers" / "models"
# The op, a model that has it, and how its cases can be launched in generation.
OPS = {
    "dsa": "deepseek-v32",
    "mla": "deepseek-v3",
    "gqa": "llama",
    "moe": "qwen3-moe",
    "gemm": "qwen3",
}
CONTEXT = Case(Phase.CONTEXT, 2, 96, 0)
AFTER_CACHED = Case(Phase.CONTEXT, 2, 96, 130)
GENERATION = Case(Phase.GENERATION, 3, 1, 200)


def models(tmp_path: Path) -> Callable[..., str]:
    """Copies a stored configuration into a model's folder."""

    def make(name: str, **changes: Any) -> str:
        folder = tmp_path / f"model-{name}"
        folder.mkdir(exist_ok=True)
        config = json.loads((MODELS / f"{name}.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


def installer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Fake]:
    """Installs a fake TensorRT-LLM; the op's mocks are imported anew under it."""
    monkeypatch.delenv("TLLM_AUTOTUNER_CACHE_PATH", raising=False)

    def put(layout: str, sm: tuple[int, int] = (9, 0)) -> Fake:
        for name in [f"opkit.layers.{op}.trtllm" for op in OPS]:
            monkeypatch.delitem(sys.modules, name, raising=False)
        return install(monkeypatch, tmp_path, layout, sm)

    return put


def plan(
    op: str, model: str, *cases: AnyCase, mode: LaunchMode = LaunchMode.EAGER, **more: Any
) -> Plan:
    planned = tuple(PlannedCase(case, mode) for case in cases)
    return Plan(op, "trtllm", model, planned, "mock.json", **more)


def build(made: Plan) -> Mock:
    return build_mock(find_op(made.op), "trtllm", made)
