"""The trtllm backend of every op, on fakes made from the signatures of TensorRT-LLM's sources."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from trtllm_fakes import LAYOUTS, Fake, Tensor, install

import opkit
from opkit.errors import BadInput, ToolMissing
from opkit.layers.manifest import Operand
from opkit.layers.mock import Mock
from opkit.layers.op import AnyCase, Case, GemmCase, LaunchMode, MoeCase, Phase
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


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Copies a stored configuration into a model's folder."""

    def make(name: str, **changes: Any) -> str:
        folder = tmp_path / f"model-{name}"
        folder.mkdir(exist_ok=True)
        config = json.loads((MODELS / f"{name}.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return make


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
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


def test_without_reuse_and_chunks_there_is_no_context_after_cached_tokens(
    fake: Any, model: Any
) -> None:
    installed = fake("new")
    args = installed.named("TorchLlmArgs")
    caching = installed.named("KvCacheConfig")(enable_block_reuse=False)
    original = args.__init__

    def without(self: Any, **given: Any) -> None:
        original(self, **given | {"kv_cache_config": caching})

    args.__init__ = without
    with pytest.raises(BadInput, match="no context step after cached tokens"):
        build(plan("gqa", model("llama"), AFTER_CACHED))


def test_what_the_server_would_not_run_is_refused(fake: Any, model: Any) -> None:
    fake("new")
    large = Case(Phase.CONTEXT, 4, 4096, 0)
    with pytest.raises(BadInput, match="needs 16,384, the server's max_num_tokens is 8,192"):
        build(plan("gqa", model("llama"), large))
    raised = build(plan("gqa", model("llama"), large, limits="cases"))
    assert raised.prepare(PlannedCase(large, LaunchMode.EAGER))().shape[0] == 16384


def test_no_room_in_the_cache_is_a_sentence(fake: Any, model: Any) -> None:
    installed = fake("new")
    mock = build(plan("gqa", model("llama"), GENERATION))
    installed.rooms = False
    with pytest.raises(BadInput, match="no room for 3 requests with 603 tokens"):
        mock.prepare(PlannedCase(GENERATION, LaunchMode.EAGER))


@pytest.mark.parametrize(
    ("sm", "allowed"), [((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)]
)
def test_dsa_runs_where_its_indexer_has_kernels(
    fake: Any, model: Any, sm: tuple[int, int], allowed: bool
) -> None:
    fake("new", sm)
    made = plan("dsa", model("deepseek-v32"), CONTEXT)
    if allowed:
        assert build(made).prepare(PlannedCase(CONTEXT, LaunchMode.EAGER))() is not None
        return
    with pytest.raises(BadInput, match=f"this GPU is SM{sm[0] * 10 + sm[1]}"):
        build(made)


def test_mla_needs_hopper(fake: Any, model: Any) -> None:
    fake("old", (8, 0))
    with pytest.raises(BadInput, match="latent attention from SM90; this GPU is SM80"):
        build(plan("mla", model("deepseek-v3"), CONTEXT))


@pytest.mark.parametrize(("sm", "allowed"), [((9, 0), False), ((10, 0), True)])
def test_an_fp8_cache_for_dsa_needs_blackwell(
    fake: Any, model: Any, sm: tuple[int, int], allowed: bool
) -> None:
    installed = fake("new", sm)
    installed.cache_algorithm = "FP8"
    made = plan("dsa", model("deepseek-v32"), CONTEXT)
    if allowed:
        assert build(made).describe().dtypes["kv_cache"] == "fp8"
        assert installed.made("DSACacheManager")[0]["dtype"] == "DataType.FP8"
        return
    with pytest.raises(BadInput, match="KV cache of FP8 needs a Blackwell GPU"):
        build(made)


@pytest.mark.parametrize(
    ("op", "name"), [("gqa", "llama"), ("mla", "deepseek-v3"), ("dsa", "deepseek-v32")]
)
def test_the_silent_fallback_of_create_attention_is_found(
    fake: Any, model: Any, op: str, name: str
) -> None:
    installed = fake("new")

    class Vanilla:
        indexer = "of another backend"

    installed.attention = Vanilla
    with pytest.raises(ToolMissing, match="TRTLLM was asked for, create_attention made a Vanilla"):
        build(plan(op, model(name), CONTEXT))


def test_the_fallback_to_its_own_backend_is_found(fake: Any, model: Any, tmp_path: Path) -> None:
    installed = fake("new")
    options = tmp_path / "options.yaml"
    options.write_text("attn_backend: FLASHINFER\n")
    with pytest.raises(ToolMissing, match="FLASHINFER was asked for, create_attention made a Trtl"):
        build(plan("gqa", model("llama"), CONTEXT, engine_args=("--config", str(options))))
    assert len(installed.made("KVCacheManager.shutdown")) == 1  # nothing is left behind


@pytest.mark.parametrize(
    ("op", "name", "message"),
    [
        ("dsa", "deepseek-v3", "no indexer in this model"),
        ("mla", "deepseek-v32", "has an indexer"),
        ("mla", "llama", "no latent attention"),
        ("gqa", "deepseek-v3", "attention is latent"),
        ("moe", "llama", "no experts"),
        ("gemm", "deepseek-v3", "not the linear modules of a dense layer"),
    ],
)
def test_a_model_without_the_op_is_refused(
    fake: Any, model: Any, op: str, name: str, message: str
) -> None:
    fake("new")
    with pytest.raises(BadInput, match=message):
        build(plan(op, model(name), CONTEXT))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "deepseek-v3"])
def test_experts_of_a_driven_step_get_steered_states(
    fake: Any, model: Any, monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    installed = fake(layout)
    module = importlib.import_module("opkit.layers.moe.routing")
    asked: dict[str, Any] = {}

    def steer(*given: Any, **more: Any) -> Tensor:
        _, choice, seed, _ = given
        asked.update(choice=choice.shape, seed=seed, **more)
        return Tensor((len(choice), 16), more["dtype"])

    monkeypatch.setattr(module, "steer", steer)
    case = MoeCase(5000, "power_law_1.2")
    mock: Any = build(plan("moe", model(name), case, seed=3))
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    assert forward().shape[0] == 5000
    experts = mock.worker.geometry.experts
    assert asked["choice"] == (5000, experts.topk)
    assert (asked["seed"], asked["scoring"]) == (3, experts.scoring)
    assert asked["dtype"] == "torch.bfloat16"  # that of the states whose routing is checked
    call = installed.made("MoE.forward")[-1]
    assert call["x"].done[-1][0] == "copy_"
    # Its router logits are those of the layer's own gate, for the steered states.
    assert installed.made("Linear.forward")[-1]["input"] is call["x"]
    lengths = installed.made("AttentionMetadata")[-1]["seq_lens"].data
    assert lengths == [2048, 2048, 904]
    assert mock.describe().model["num_experts"] == experts.number
    assert mock.worker.model.read.get("first_k_dense_replace", 0) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("mode", list(LaunchMode))
def test_a_single_product_needs_no_model(
    fake: Any, monkeypatch: pytest.MonkeyPatch, layout: str, dtype: str, mode: LaunchMode
) -> None:
    installed = fake(layout)
    case = GemmCase(24, 64, 128, dtype)
    mock = build(plan("gemm", "", case, mode=mode))
    module = importlib.import_module("opkit.layers.gemm.trtllm")
    monkeypatch.setattr(
        module, "sample", lambda name, value: Operand(name, value.shape, "", 1, 0, 0)
    )
    assert mock.prepare(PlannedCase(case, mode))().shape == (24, 64)
    assert mock.probe().shape == (24, 64)
    (made,) = installed.made("Linear")
    assert (made["in_features"], made["out_features"], made["bias"]) == (128, 64, False)
    (loaded,) = installed.made("Linear.load_weights")
    assert set(loaded["weights"][0]) == (
        {"weight"} if dtype == "bfloat16" else {"weight", "weight_scale"}
    )
    assert [operand.shape for operand in mock.operands(PlannedCase(case, mode))] == [
        (64, 128),
        (24, 128),
    ]
    assert len(installed.made("autotune")) == 1
    assert mock.describe().dtypes["weights"] == dtype
    mock.close()


def test_float8_needs_ada(fake: Any) -> None:
    fake("new", (8, 0))
    case = GemmCase(24, 64, 128, "float8_e4m3fn")
    with pytest.raises(BadInput, match="multiplies no float8"):
        build(plan("gemm", "", case)).prepare(PlannedCase(case, LaunchMode.EAGER))


def test_products_and_steps_need_a_plan_each(fake: Any, model: Any) -> None:
    fake("new")
    with pytest.raises(BadInput, match="a plan each"):
        build(plan("gemm", model("qwen3"), CONTEXT, GemmCase(1, 2, 3)))


@pytest.mark.parametrize("recipe", ["normal", "zeros", "rows"])
def test_inputs_are_overwritten_by_recipe(fake: Any, model: Any, recipe: str) -> None:
    fake("new")
    mock: Any = build(plan("mla", model("deepseek-v3"), CONTEXT, inputs=recipe))
    mock.prepare(PlannedCase(CONTEXT, LaunchMode.EAGER))
    (states,) = [value for name, value in mock.probe().inputs.items() if "hidden" in name]
    assert [what for what, _ in states.done] == ["zero_" if recipe == "zeros" else "copy_"]


def test_the_tuner_shares_its_cache(fake: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = fake("old")
    monkeypatch.setenv("TLLM_AUTOTUNER_CACHE_PATH", "tactics.json")
    mock = build(plan("moe", model("qwen3-moe"), CONTEXT))
    assert installed.made("autotune") == [{"cache_path": "tactics.json", "rank": 0}]
    assert mock.describe().recipe["tuner_cache"] == "TLLM_AUTOTUNER_CACHE_PATH=tactics.json"
    monkeypatch.delenv("TLLM_AUTOTUNER_CACHE_PATH")
    assert "tactics may differ" in mock.describe().recipe["tuner_cache"]


def test_operands_are_sampled_eagerly(
    fake: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = fake("new")
    shared = importlib.import_module("opkit.layers.backends.trtllm.mock")
    watched: list[Any] = []

    def watch(module: Any, forward: Any, phase: str, extra: Any) -> tuple[Operand, ...]:
        watched.append((type(module).__name__, phase, extra))
        forward()
        return ()

    monkeypatch.setattr(shared, "watch", watch)
    operands = importlib.import_module("opkit.layers.operands")
    for place in (shared, operands):  # the fakes' tensors hold no values
        monkeypatch.setattr(
            place, "sample", lambda name, value: Operand(name, value.shape, "", 1, 0, 0)
        )
    mock = build(plan("moe", model("qwen3-moe"), CONTEXT))
    before = len(installed.made("MoE.forward"))
    names = [item.name for item in mock.operands(PlannedCase(CONTEXT, LaunchMode.GRAPH))]
    assert "context mlp.experts/x" in names
    assert "mlp.experts.w3_w1_weight" in names
    assert watched == [("CutlassFusedMoE", "context", {})]
    assert len(installed.made("MoE.forward")) - before == 2  # the step's, and the watched one


def test_the_servers_options_reach_the_engine(fake: Any, model: Any, tmp_path: Path) -> None:
    installed = fake("new")
    options = tmp_path / "options.yaml"
    options.write_text("moe_config: {backend: CUTLASS}\nenable_chunked_prefill: true\n")
    flags = ("--tp_size", "1", "--max_batch_size=64", "--extra_llm_api_options", str(options))
    mock: Any = build(plan("moe", model("qwen3-moe"), CONTEXT, engine_args=flags))
    (made,) = installed.made("TorchLlmArgs")
    assert made["moe_config"] == {"backend": "CUTLASS"}
    assert (made["max_batch_size"], made["max_num_tokens"]) == (64, 8192)
    features = installed.made("AttentionRuntimeFeatures")[-1]
    assert (features["chunked_prefill"], features["chunk_size"]) == (True, 8192)
    assert mock.describe().engine_args == flags


def test_options_that_the_engine_does_not_know_are_refused(
    fake: Any, model: Any, tmp_path: Path
) -> None:
    installed = fake("new")
    options = tmp_path / "options.yaml"
    options.write_text("no_such_option: 1\n")
    with pytest.raises(BadInput, match=f"{installed.version} refuses the server's options"):
        build(plan("gqa", model("llama"), CONTEXT, engine_args=("--config", str(options))))


def test_the_quantisation_of_the_checkpoint_is_read(fake: Any, model: Any) -> None:
    installed = fake("new")
    folder = Path(model("llama"))
    (folder / "hf_quant_config.json").write_text("{}")
    mock = build(plan("gqa", str(folder), CONTEXT))
    made = Path(installed.made("TorchLlmArgs")[0]["model"])
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "hf_quant_config.json"]
    mock.close()
    shutil.rmtree(folder)
