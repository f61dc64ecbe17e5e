"""Storing an op's inputs in an LLM-API engine, and replaying them, on fakes."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from trtllm_fakes import Model, install
from trtllm_paper import Fake, Tensor

import opkit
from opkit.errors import BadInput, ToolMissing
from opkit.layers.backends.trtllm import capture
from opkit.layers.backends.trtllm.layer import seams_of
from opkit.layers.backends.trtllm.probe import Upstream
from opkit.layers.captured import CaptureInfo, read_info
from opkit.layers.manifest import Wave
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.registry import build_mock, find_op

MODELS = Path(opkit.__file__).parent / "layers" / "models"
INFO = CaptureInfo("gqa", "trtllm", 0, 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    monkeypatch.delitem(sys.modules, "opkit.layers.gqa.trtllm", raising=False)
    return install(monkeypatch, tmp_path, "new")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text((MODELS / "llama.json").read_text())
    return made


@pytest.fixture
def model(fake: Fake, folder: Path) -> Model:
    return Model(fake, folder, types.SimpleNamespace(attn_backend="TRTLLM"))


def step(fake: Fake, model: Model, requests: list[tuple[int, int, int]]) -> None:
    """The engine runs a step: request, cached tokens and new tokens of each."""
    metadata = types.SimpleNamespace(
        request_ids=[request for request, _, _ in requests],
        kv_cache_params=types.SimpleNamespace(
            num_cached_tokens_per_seq=[past for _, past, _ in requests]
        ),
        seq_lens=Tensor((len(requests),), "torch.int32", [tokens for _, _, tokens in requests]),
    )
    tokens = Tensor((sum(count for _, _, count in requests),), "torch.int32")
    fake.extra = {"attention_metadata": lambda: metadata}
    model.model(attn_metadata=metadata, input_ids=tokens, position_ids=tokens)


def test_the_rows_of_each_request_are_stored(fake: Fake, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    waves = [Wave(2, 6, 2)]
    with capture.store_inputs(model, INFO, "LlamaForCausalLM", waves, out):
        step(fake, model, [(11, 0, 6), (12, 0, 4)])
        step(fake, model, [(12, 4, 2)])  # the rest of a prompt in chunks
        step(fake, model, [(11, 6, 1), (12, 6, 1)])
    info = read_info(out)
    assert info.lengths == {"6-0": 7, "6-1": 7}
    assert info.versions["tensorrt_llm"] == fake.version
    stored = json.loads((out / "sequence-6-1.pt").read_text())
    width = 32 * 128 + 2 * 8 * 128  # query, keys and values, fused
    assert stored == {"self_attn.forward_impl/q": [7, width]}
    before = len(fake.calls)
    step(fake, model, [(13, 0, 1)])
    assert len(fake.calls) > before
    assert "forward_impl" not in vars(model.model.layers[0].self_attn)  # the hook is gone


def test_a_token_that_is_computed_twice_is_stored_once(
    fake: Fake, model: Model, tmp_path: Path
) -> None:
    out = tmp_path / "capture"
    with capture.store_inputs(model, INFO, "LlamaForCausalLM", [Wave(1, 6, 1)], out):
        step(fake, model, [(1, 0, 4)])
        step(fake, model, [(1, 2, 4)])
        step(fake, model, [(1, 9, 4)])  # what follows a gap has no place
    assert read_info(out).lengths == {"6-0": 6}


@pytest.mark.usefixtures("fake")
def test_the_hooks_go_when_the_run_fails(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    with (
        pytest.raises(RuntimeError, match="the engine died"),
        capture.store_inputs(model, INFO, "LlamaForCausalLM", [], out),
    ):
        raise RuntimeError("the engine died")
    assert "forward_impl" not in vars(model.model.layers[0].self_attn)
    assert not out.exists()


def test_the_worker_extension_does_the_same(fake: Fake, model: Model, tmp_path: Path) -> None:
    worker = capture.CaptureExtension()
    worker.engine = types.SimpleNamespace(model_engine=types.SimpleNamespace(model=model))
    worker.opkit_capture_start("gqa", "LlamaForCausalLM", 0)
    step(fake, model, [(1, 0, 6)])
    info = {"op": "gqa", "backend": "trtllm", "layer": 0, "seed": 0}
    assert worker.opkit_capture_stop(str(tmp_path / "c"), info, [(1, 6, 1)]) == {"6-0": 6}
    module, _, name = capture.EXTENSION.rpartition(".")
    assert getattr(sys.modules[module], name) is capture.CaptureExtension


@pytest.mark.usefixtures("fake")
def test_a_model_in_this_process_is_found(model: Model) -> None:
    engine = types.SimpleNamespace(model_engine=types.SimpleNamespace(model=model))
    llm = types.SimpleNamespace(_executor=types.SimpleNamespace(engine=engine))
    assert capture.model_of(llm, Upstream()) is model


def test_a_model_in_another_process_is_a_clear_sentence(fake: Fake) -> None:
    llm = types.SimpleNamespace(_executor=types.SimpleNamespace(workers=[]))
    with pytest.raises(ToolMissing, match=f"{fake.version} keeps this engine's model in another"):
        capture.model_of(llm, Upstream())


def test_seams_are_those_of_the_mocks() -> None:
    assert [seam.name for seam in seams_of("gqa", "LlamaForCausalLM")] == ["self_attn.forward_impl"]
    assert [seam.name for seam in seams_of("moe", "MixtralForCausalLM")] == [
        "block_sparse_moe.experts"
    ]
    assert [seam.name for seam in seams_of("dsa", "DeepseekV32ForCausalLM")] == ["self_attn"]


def replaying(folder: Path, out: Path, case: Case, stored: dict[str, Any]) -> Any:
    """A mock of gqa that replays a capture with these inputs."""
    torch: Any = sys.modules["torch"]
    torch.load = lambda *_, **__: {name: Tensor(tuple(shape)) for name, shape in stored.items()}
    planned = PlannedCase(case, LaunchMode.EAGER)
    plan = Plan(
        "gqa", "trtllm", str(folder), (planned,), "m.json", inputs="captured", captured=str(out)
    )
    mock = build_mock(find_op("gqa"), "trtllm", plan)
    return mock, planned


@pytest.mark.usefixtures("fake")
def test_the_mock_replays_what_was_stored(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    out.mkdir()
    CaptureInfo("gqa", "trtllm", 0, 0, lengths={"64-0": 70, "64-1": 70}).write(out)
    case = Case(Phase.CONTEXT, 2, 64, 0)
    mock, planned = replaying(folder, out, case, {"self_attn.forward_impl/q": [70, 6144]})
    mock.prepare(planned)
    (query,) = mock.probe().inputs.values()
    ((what, other),) = query.done
    assert (what, other.shape) == ("copy_", (128, 6144))
    recipe = mock.describe().recipe["activations"]
    assert recipe == "captured from the engine's layer: capture; replayed: self_attn.forward_impl/q"


def test_a_capture_of_something_else_is_refused(fake: Fake, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "capture"
    out.mkdir()
    CaptureInfo("gqa", "trtllm", 0, 0, lengths={"64-0": 70}).write(out)
    case = Case(Phase.CONTEXT, 1, 64, 0)
    mock, planned = replaying(folder, out, case, {"mlp/x": [70, 16]})
    with pytest.raises(BadInput, match=r"none of the op's inputs was captured: self_attn\.forw"):
        mock.prepare(planned)
    CaptureInfo("mla", "trtllm", 0, 0, lengths={"64-0": 70}).write(out)
    with pytest.raises(BadInput, match="captured for mla on trtllm"):
        replaying(folder, out, case, {})
    assert len(fake.made("KVCacheManager.shutdown")) == 1
