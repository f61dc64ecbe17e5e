"""What the trtllm mocks refuse, how ops drive and feed them, and which options reach the engine."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from trtllm_bench import (
    AFTER_CACHED,
    CONTEXT,
    GENERATION,
    build,
    installer,
    models,
    plan,
)
from trtllm_paper import LAYOUTS, Tensor

from opkit.errors import BadInput, ToolMissing
from opkit.layers.manifest import Operand
from opkit.layers.op import Case, GemmCase, LaunchMode, MoeCase, Phase
from opkit.layers.plan import PlannedCase


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """See :func:`trtllm_bench.models`."""
    return models(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """See :func:`trtllm_bench.installer`."""
    return installer(monkeypatch, tmp_path)


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
