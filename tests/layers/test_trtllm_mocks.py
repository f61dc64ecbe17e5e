"""The trtllm backend of every op, on fakes made from the signatures of TensorRT-LLM's sources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trtllm_bench import (
    AFTER_CACHED,
    CONTEXT,
    GENERATION,
    MODELS,
    OPS,
    build,
    installer,
    models,
    plan,
)
from trtllm_paper import LAYOUTS, Tensor

from opkit.errors import BadInput
from opkit.layers.op import Case, GemmCase, LaunchMode, Phase
from opkit.layers.plan import PlannedCase
from opkit.layers.registry import find_op


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """See :func:`trtllm_bench.models`."""
    return models(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """See :func:`trtllm_bench.installer`."""
    return installer(monkeypatch, tmp_path)


def test_a_model_of_each_op_is_there() -> None:
    for name in OPS.values():
        assert (MODELS / f"{name}.json").is_file()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [CONTEXT, AFTER_CACHED, GENERATION])
def test_the_whole_path_keeps_to_the_signatures(
    fake: Any, model: Any, layout: str, op: str, case: Case
) -> None:
    installed = fake(layout)
    mock = build(plan(op, model(OPS[op]), case))
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    seams = {"gqa": "Attention.forward_impl", "moe": "MoE.forward", "gemm": "Linear.forward"}
    seam = seams.get(op, "MLA.forward")
    before = len(installed.made(seam))
    output = forward()
    launched = len(installed.made(seam)) - before
    assert launched == (4 if op == "gemm" else 1)  # the op, and nothing else
    probe = mock.probe()
    assert output.shape == probe.shape
    assert probe.shape[0] == case.batch * case.tokens
    assert probe.dtype == "bfloat16"
    assert probe.inputs
    assert bool(probe.caches) == (op in ("dsa", "mla", "gqa"))
    manifest = mock.describe()
    assert manifest.versions["tensorrt_llm"] == installed.version
    assert "not run" in manifest.notes[0]
    assert find_op(op).work is not None
    assert find_op(op).work(case if op != "gemm" else GemmCase(1, 2, 3), manifest)[0] > 0  # type: ignore[misc]
    columns = find_op(op).columns
    assert columns is not None
    if op in ("dsa", "mla", "gqa"):
        assert tuple(columns(case, manifest)) == find_op(op).table(case).columns
    mock.close()
    assert len(installed.made("KVCacheManager.shutdown")) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["dsa", "mla", "gqa", "moe", "gemm"])
def test_generation_is_replayed_from_a_graph(fake: Any, model: Any, layout: str, op: str) -> None:
    installed = fake(layout)
    mock = build(
        plan(op, model(OPS[op]), GENERATION, mode=LaunchMode.GRAPH, engine_args=graphs(model))
    )
    forward = mock.prepare(PlannedCase(GENERATION, LaunchMode.GRAPH))
    assert not installed.made("replay")
    assert forward() is not None
    assert len(installed.made("replay")) == 1
    graphed = installed.made("AttentionMetadata.create_cuda_graph_metadata")
    assert graphed == ([{"max_batch_size": 3}] if op in ("dsa", "mla", "gqa") else [])
    mock.close()


def graphs(model: Any) -> tuple[str, ...]:
    path = Path(model("llama")).parent / "options.yaml"
    path.write_text("cuda_graph_config: {enable_padding: true}\n")
    return ("--config", str(path))


@pytest.mark.parametrize("op", ["dsa", "gqa"])
def test_no_graph_in_context_or_with_graphs_switched_off(fake: Any, model: Any, op: str) -> None:
    fake("new")
    made = plan(op, model(OPS[op]), CONTEXT, GENERATION, engine_args=graphs(model))
    mock = build(made)
    with pytest.raises(BadInput, match="no full CUDA graph in context"):
        mock.prepare(PlannedCase(CONTEXT, LaunchMode.GRAPH))
    off = build(plan(op, model(OPS[op]), GENERATION))
    with pytest.raises(BadInput, match="switch graphs off"):
        off.prepare(PlannedCase(GENERATION, LaunchMode.GRAPH))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engine_gets_one_layer_and_one_rank(fake: Any, model: Any, layout: str) -> None:
    installed = fake(layout)
    mock: Any = build(plan("mla", model("deepseek-v3"), CONTEXT, tp_size=8))
    read = mock.worker.model.read
    stored = json.loads((MODELS / "deepseek-v3.json").read_text())
    assert read["num_hidden_layers"] == 1
    assert read["num_attention_heads"] == stored["num_attention_heads"] // 8
    assert read["hidden_size"] == stored["hidden_size"]
    (mapping,) = installed.made("Mapping")
    assert mapping == {"world_size": 1, "rank": 0, "tp_size": 1, "pp_size": 1}
    (arguments,) = installed.made("TorchLlmArgs")
    assert (arguments["load_format"], arguments["tensor_parallel_size"]) == ("dummy", 1)
    manifest = mock.describe()
    assert manifest.model["num_heads"] == stored["num_attention_heads"] // 8
    assert manifest.model["num_hidden_layers"] == stored["num_hidden_layers"]
    assert any("tensor parallelism of 8 simulated" in note for note in manifest.notes)
    folder = Path(arguments["model"])
    assert folder.is_dir()
    mock.close()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("layout", "backend", "manager", "metadata"),
    [
        ("old", "sparse_attn_config", "sparse_attn_config", "sparse_attention_config"),
        ("new", "sparse_params", "sparse_attention_config", "sparse_metadata_params"),
    ],
)
def test_the_sparse_configuration_goes_by_each_layouts_names(
    fake: Any, model: Any, layout: str, backend: str, manager: str, metadata: str
) -> None:
    installed = fake(layout)
    build(plan("dsa", model("deepseek-v32"), CONTEXT)).prepare(
        PlannedCase(CONTEXT, LaunchMode.EAGER)
    )
    assert backend in installed.made("get_attention_backend")[-1]
    (made,) = installed.made("DSACacheManager")
    assert manager in made
    assert made["num_kv_heads"] == 1
    assert made["kv_cache_type"] == "SELFKONLY"
    assert made["tokens_per_block"] == 64  # FlashMLA's on Hopper
    assert metadata in installed.made("AttentionMetadata")[-1]


def test_a_step_is_described_as_the_engine_describes_it(fake: Any, model: Any) -> None:
    installed = fake("new")
    mock: Any = build(plan("gqa", model("llama"), GENERATION, AFTER_CACHED))
    mock.prepare(PlannedCase(GENERATION, LaunchMode.EAGER))
    made = installed.made("AttentionMetadata")[-1]
    assert made["seq_lens"].data == [1, 1, 1]
    assert made["num_contexts"] == 0
    assert made["request_ids"] == [0, 1, 2]
    assert made["prompt_lens"] == [200, 200, 200]
    assert made["kv_cache_params"].num_cached_tokens_per_seq == [200, 200, 200]
    assert made["runtime_features"].cache_reuse is True  # the server's default
    run = installed.made("DecoderModel.forward")[-1]
    assert run["position_ids"].data == [[200, 200, 200]]
    mock.prepare(PlannedCase(AFTER_CACHED, LaunchMode.EAGER))
    made = installed.made("AttentionMetadata")[-1]
    assert made["prompt_lens"] == [96, 96]
    assert made["num_contexts"] == 2
    assert installed.made("DecoderModel.forward")[-1]["position_ids"].data == [
        [*range(130, 226), *range(130, 226)]
    ]


def test_the_past_is_prefilled_in_steps_that_the_server_allows(fake: Any, model: Any) -> None:
    installed = fake("new")
    case = Case(Phase.GENERATION, 2, 1, 300)
    mock: Any = build(plan("gqa", model("llama"), case, engine_args=("--max_num_tokens", "128")))
    tuned = len(installed.made("DecoderModel.forward"))
    mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    steps = [run["position_ids"].data[0] for run in installed.made("DecoderModel.forward")[tuned:]]
    assert [(step[0], len(step)) for step in steps] == [
        (0, 128), (128, 128), (256, 44), (0, 128), (128, 128), (256, 44), (300, 2),
    ]  # fmt: skip
    assert "at most 128 tokens a step" in mock.describe().recipe["kv_cache"]


def test_pooled_caches_prefill_one_request_and_repeat_its_blocks(fake: Any, model: Any) -> None:
    installed = fake("new")
    mock: Any = build(plan("gqa", model("llama"), GENERATION, caches="pooled"))
    tuned = len(installed.made("DecoderModel.forward"))
    cache = Tensor((64, 1, 32, 8, 128))
    mock.worker.cache.manager.get_buffers = lambda *_: cache
    mock.prepare(PlannedCase(GENERATION, LaunchMode.EAGER))
    assert len(installed.made("DecoderModel.forward")) - tuned == 2  # one prefill, one step
    # 201 tokens are 7 blocks of 32 each; the first request fills 6, the other 15 are copies.
    assert [done[1].data for done in cache.done] == [
        0,
        *(i % 6 for i in range(7)),
        *(i % 6 for i in range(7)),
    ]


def test_cache_views_hold_the_blocks_of_the_step(fake: Any, model: Any) -> None:
    fake("old")
    mock: Any = build(plan("dsa", model("deepseek-v32"), AFTER_CACHED))
    mock.prepare(PlannedCase(AFTER_CACHED, LaunchMode.EAGER))
    views = mock.probe().caches
    assert [view.name for view in views] == ["kv_cache", "indexer_cache"]
    # 130 tokens are cached, 96 are new: of four blocks of 64 two are wholly behind the step.
    assert views[0].past == (0, 1, 4, 5)
    assert views[0].new == (2, 3, 6, 7)
    assert mock.describe().dtypes["indexer_cache"] == "uint8"
