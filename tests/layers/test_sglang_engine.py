"""The order of SGLang's start-up, and what is said during it. Needs torch, not SGLang."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_sglang
import pytest
import record_sglang

from opkit.errors import BadInput
from opkit.layers import progress

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

ENGINE = "opkit.layers.backends.sglang.engine"
MODEL = "DeepseekV32ForCausalLM"


class Runner:
    """As much of the engine's ``ModelRunner`` as its start-up calls."""

    steps: list[str]
    registry: dict[str, type]
    graphs: Any = "graphs"

    def __init__(self, **given: Any) -> None:
        self.steps.append("load " + self.registry[MODEL].__name__)
        self.given, self.decode_cuda_graph_runner = given, None

    def alloc_memory_pool(self) -> None:
        self.steps.append("pool")

    def init_attention_backends(self) -> None:
        self.steps.append("attention")

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        self.steps.append(f"graphs {capture_decode_cuda_graph}")
        self.decode_cuda_graph_runner = self.graphs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real ``engine``, over names of SGLang that only remember being called."""
    fake_sglang.install(monkeypatch)
    steps: list[str] = []
    registry = {MODEL: type("Theirs", (), {})}
    runner = type("ModelRunner", (Runner,), {"steps": steps, "registry": registry})
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[MODEL]))
    known: dict[str, Any] = {
        "ModelRunner": runner,
        "ModelRegistry": SimpleNamespace(models=registry),
        "ModelConfig": SimpleNamespace(from_server_args=lambda _: config),
    }
    file = record_sglang.ROOT / "opkit" / "layers" / "backends" / "sglang" / "engine.py"
    for name, imported in record_sglang.imports(file.read_text()).items():
        module = sys.modules.get(name) or ModuleType(name)
        for item in imported - vars(module).keys():
            setattr(module, item, known.get(item, lambda *_, item=item: steps.append(item)))
        for end in range(1, name.count(".") + 1):
            parent = ".".join(name.split(".")[:end])
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, ENGINE)
    package = importlib.import_module(ENGINE.rpartition(".")[0])
    monkeypatch.setattr(package, "engine", None, raising=False)  # taken away again afterwards
    made = importlib.import_module(ENGINE)
    monkeypatch.setattr(progress, "_told", [lambda message: steps.append(f"said {message}")])
    return SimpleNamespace(module=made, steps=steps, runner=runner, registry=registry)


def start(engine: Any, graphs: bool = True) -> Any:
    args = SimpleNamespace(mem_fraction_static=0.7, base_gpu_id=0, nccl_port=1)
    return engine.module.start(args, ["self_attn"], 0, graphs)


def test_the_order_of_the_engines_own_start_up(engine: Any) -> None:
    start(engine, graphs=False)
    assert engine.steps == [
        "_set_envs_and_config", "set_global_server_args_for_scheduler", "initialize_moe_config",
        "initialize_fp8_gemm_config", "initialize_fp4_gemm_config", "load OneLayerModel", "pool",
        "attention", "graphs False",
    ]  # fmt: skip
    assert engine.registry[MODEL].__name__ == "Theirs"  # put back


def test_who_waits_for_graphs_is_told_what_for(engine: Any) -> None:
    start(engine)
    before, said, captured = engine.steps[-3:]
    assert (before, captured) == ("attention", "graphs True")
    assert "compiles its kernels" in said
    assert "min, once" in said


def test_a_server_without_graphs_is_refused(engine: Any) -> None:
    engine.runner.graphs = None
    with pytest.raises(BadInput, match="flags allow no graphs"):
        start(engine)


def test_an_unknown_architecture_is_refused(engine: Any) -> None:
    engine.registry.clear()
    with pytest.raises(BadInput, match=f"SGLang has no model {MODEL}"):
        start(engine)
