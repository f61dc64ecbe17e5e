"""The one-layer models of vLLM: what they record, pin, launch and load. Needs torch alone."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opkit.errors import BadInput
from opkit.layers.captured import Captured, CaptureInfo
from opkit.layers.op import Case, Phase

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
import fake_vllm  # noqa: E402  # needs torch

HIDDEN = "self_attn/hidden_states"
ATTENTION = ("self_attn",)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The fakes."""
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def models(engine: SimpleNamespace) -> Any:
    """opkit's models, on the fakes."""
    assert engine
    return importlib.import_module("opkit.layers.backends.vllm.models")


def built(models: Any, *paths: str, layer: int = 0, max_tokens: int = 16) -> Any:
    torch.manual_seed(1)
    config = fake_vllm.config(max_tokens=max_tokens)
    return models.inside(config, paths or ATTENTION, layer)(vllm_config=config)


def step(model: Any, tokens: int, first: int = 0) -> Any:
    """One step of distinct tokens at their positions."""
    ids = torch.arange(first, first + tokens)
    return model(input_ids=ids, positions=ids + 1, intermediate_tensors=None, inputs_embeds=None)


def given(model: Any, tokens: int, first: int = 0) -> Any:
    """What the engine's layer gives its attention in that step."""
    rows = model.engine.model.embed_tokens(torch.arange(first, first + tokens))
    fused = model.engine.model.layers[0].before(rows)
    return fused[:, fake_vllm.WIDTH : 2 * fake_vllm.WIDTH]


# What is launched


def test_the_op_is_launched_with_what_the_engine_gives_it(models: Any) -> None:
    model = built(models)
    output = step(model, 5)
    arguments = model.last.arguments
    assert set(arguments) == {"self_attn/positions", HIDDEN}
    assert torch.equal(arguments[HIDDEN], given(model, 5))
    attention = model.ops()["self_attn"]
    assert torch.equal(output, attention.inner(given(model, 5)) * (torch.arange(5) + 1)[:, None])
    assert attention.calls == 2  # by the engine's layer, and alone


def test_the_forward_context_of_the_step_is_kept(models: Any, engine: SimpleNamespace) -> None:
    model = built(models)
    step(model, 2)
    assert model.last.context is engine.context


def test_a_launch_runs_the_ops_modules_and_nothing_else(models: Any) -> None:
    model = built(models)
    first = step(model, 3)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    again = model.launch(**model.last.arguments)
    assert torch.equal(first, again)
    assert ran == ["engine.model.layers.0.self_attn", "engine.model.layers.0.self_attn.inner"]


def test_what_launches_may_be_replaced(models: Any) -> None:
    # As the CUDA graph's wrapper does.
    model = built(models)
    launched: list[dict[str, Any]] = []
    model.launch = lambda **arguments: launched.append(arguments)
    step(model, 3)
    assert launched == [model.last.arguments]


def test_several_modules_are_launched_in_order_each_with_its_own_arguments(models: Any) -> None:
    model = built(models, "before", "self_attn.inner", "mlp")
    output = step(model, 4)
    assert list(model.ops()) == ["before", "self_attn.inner", "mlp"]
    assert list(model.last.arguments) == ["before/input", "self_attn.inner/input", "mlp/input"]
    assert torch.equal(output, model.ops()["mlp"](model.last.arguments["mlp/input"]))


def test_paths_that_begin_alike_are_told_apart(models: Any) -> None:
    model = built(models, "self_attn", "self_attn.inner")
    step(model, 2)
    assert set(model.last.arguments) == {
        "self_attn/positions", HIDDEN, "self_attn.inner/input",
    }  # fmt: skip
    assert model.launch(**model.last.arguments).shape == (2, fake_vllm.WIDTH)


def test_a_path_that_the_layer_lacks_is_refused(models: Any) -> None:
    with pytest.raises(BadInput, match=r"Layer of vLLM has no self_attn\.indexer, experts") as told:
        built(models, "self_attn", "self_attn.indexer", "experts")
    assert "\n" not in str(told.value)


def test_the_class_tells_what_the_engines_class_tells(models: Any) -> None:
    config = fake_vllm.config()
    made = models.inside(config, ATTENTION, 3)
    assert made.packed_modules_mapping == fake_vllm.Engine.packed_modules_mapping
    assert not hasattr(made, "hf_to_vllm_mapper")
    assert (made.paths, made.engine_layer) == (ATTENTION, 3)
    assert models.InsideLayer.paths == ()  # the next model has a class of its own
    assert issubclass(made, models.OneLayerModel)


# Pinned arguments: graphs are captured over their addresses


def test_arguments_of_every_step_lie_at_one_address(models: Any) -> None:
    model = built(models)
    step(model, 16)
    before = {name: value.data_ptr() for name, value in model.last.arguments.items()}
    step(model, 3, first=20)
    assert {name: value.data_ptr() for name, value in model.last.arguments.items()} == before
    assert torch.equal(model.last.arguments[HIDDEN], given(model, 3, first=20))
    assert model.last.arguments["self_attn/positions"].tolist() == [21, 22, 23]


def test_a_slice_keeps_its_distance_from_row_to_row(models: Any) -> None:
    model = built(models)
    step(model, 4)
    assert model.last.arguments[HIDDEN].stride() == (3 * fake_vllm.WIDTH, 1)
    assert model.last.arguments[HIDDEN].shape == (4, fake_vllm.WIDTH)


def test_a_step_may_be_larger_than_the_limit_it_is_profiled_with(models: Any) -> None:
    model = built(models, max_tokens=2)
    step(model, 5)
    assert torch.equal(model.last.arguments[HIDDEN], given(model, 5))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)])
def test_tensors_of_any_rank_are_pinned(models: Any, shape: tuple[int, ...]) -> None:
    model = built(models)
    value = torch.randn(shape)
    pinned = model.pin("x", value)
    assert torch.equal(pinned, value)
    assert pinned.stride() == value.stride()
    assert model.pin("x", value[:2]).data_ptr() == pinned.data_ptr() != value.data_ptr()


# Recipes of inputs


@pytest.mark.parametrize("recipe", ["normal", "zeros", "rows"])
def test_a_recipe_overwrites_floating_point_arguments_alone(models: Any, recipe: str) -> None:
    model = built(models)
    model.recipe = recipe
    step(model, 6)
    hidden = model.last.arguments[HIDDEN]
    assert model.last.arguments["self_attn/positions"].tolist() == [1, 2, 3, 4, 5, 6]
    if recipe == "zeros":
        assert torch.count_nonzero(hidden) == 0
    elif recipe == "rows":
        assert torch.equal(hidden, given(model, 6)[:1].expand(6, -1))
    else:
        assert 0.5 < hidden.std() < 1.5
        first = hidden.clone()
        step(model, 6)
        assert torch.equal(model.last.arguments[HIDDEN], first)


@pytest.fixture
def stored(tmp_path: Path) -> Captured:
    """A request of six tokens; row r is all 100 + r."""
    rows = (100 + torch.arange(6.0))[:, None].expand(6, fake_vllm.WIDTH).clone()
    torch.save({HIDDEN: rows}, tmp_path / "sequence-4-0.pt")
    CaptureInfo("dsa", "vllm", 0, 0, lengths={"4-0": 6}).write(tmp_path)
    return Captured(tmp_path, "dsa", "vllm")


def test_captured_rows_take_the_place_of_the_engines(models: Any, stored: Captured) -> None:
    model = built(models)
    model.captured, model.recipe = stored, "captured"
    stored.select(Case(Phase.CONTEXT, 1, 2, 2))
    model.rows = [(0, 2, 2)]
    step(model, 3)  # one row more than the step has: padding of a graph
    hidden = model.last.arguments[HIDDEN]
    assert hidden[:, 0].tolist()[:2] == [102, 103]
    assert torch.equal(hidden[2], given(model, 3)[2])
    assert model.last.arguments["self_attn/positions"].tolist() == [1, 2, 3]  # not stored


def test_a_step_of_no_case_takes_nothing_from_the_capture(models: Any, stored: Captured) -> None:
    model = built(models)
    model.captured, model.recipe = stored, "captured"
    step(model, 4)  # the engine's own profiling
    assert torch.equal(model.last.arguments[HIDDEN], given(model, 4))


# Watching, and weights


def test_what_is_watched_is_told_by_its_path_and_argument(models: Any) -> None:
    layer = fake_vllm.Layer()
    told: list[str] = []
    modules = {"self_attn": layer.self_attn, "mlp": layer.mlp}
    with models.watched(modules, lambda name, _: told.append(name)):
        layer(torch.ones(2), torch.ones(2, fake_vllm.WIDTH))
    assert told == ["self_attn/positions", HIDDEN, "mlp/input"]
    layer(torch.ones(2), torch.ones(2, fake_vllm.WIDTH))
    assert len(told) == 3


def test_hooks_go_also_when_the_engine_fails(models: Any) -> None:
    layer = fake_vllm.Layer()
    modules = {"self_attn": layer.self_attn}
    with pytest.raises(ZeroDivisionError), models.watched(modules, lambda *_: None):
        raise ZeroDivisionError
    assert not layer.self_attn._forward_pre_hooks


def test_weights_of_one_layer_are_loaded(models: Any) -> None:
    model = built(models, layer=2)
    whole = fake_vllm.Engine(vllm_config=fake_vllm.config(layers=3))
    loaded = model.load_weights(whole.named_parameters())
    assert loaded == set(dict(model.named_parameters()))  # vLLM asks that none is left out
    attention = whole.model.layers[2].self_attn.inner.weight
    assert torch.equal(model.ops()["self_attn"].inner.weight, attention)
    assert torch.equal(model.engine.model.embed_tokens.weight, whole.model.embed_tokens.weight)
