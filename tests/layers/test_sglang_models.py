"""The one-layer model of SGLang: what it records, launches and captures. Needs torch alone."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import fake_sglang
import pytest

from opkit.errors import BadInput

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
nn = torch.nn

WIDTH = 8


class Attention(nn.Module):  # type: ignore[misc, name-defined]
    """Counts its calls; its input is a slice of a fused product."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.calls: list[Any] = []

    def prepare_qkv_latent(self, hidden: Any, batch: Any) -> Any:
        return hidden, batch

    def forward(
        self, positions: Any, hidden_states: Any, forward_batch: Any, zero_allocator: Any
    ) -> Any:
        zero_allocator._pointer += 1
        self.calls.append((positions, hidden_states, forward_batch, zero_allocator))
        return self.inner(hidden_states) + positions[:, None], None


class Layer(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.self_attn = Attention()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.mlp_calls = 0
        latent = self.self_attn.prepare_qkv_latent
        self.layer_communicator = SimpleNamespace(qkv_latent_func=latent)

    def forward(self, positions: Any, hidden: Any, batch: Any) -> Any:
        fused = self.before(hidden)
        part = fused[:, WIDTH : 2 * WIDTH]
        out, _ = self.self_attn(
            positions=positions,
            hidden_states=part,
            forward_batch=batch,
            zero_allocator=fake_sglang.BumpAllocator(),
        )
        fused.zero_()  # engines write over what they need no more
        self.mlp_calls += 1
        return self.mlp(out)


class Inner(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList([Layer()])

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        return self.layers[0](positions, self.embed(input_ids), forward_batch)


class EngineModel(nn.Module):  # type: ignore[misc, name-defined]
    """The engine's model class."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config
        self.model = Inner()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    state = fake_sglang.install(monkeypatch)
    state.models = importlib.import_module("opkit.layers.backends.sglang.models")
    state.capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


@pytest.fixture
def model(engine: Any) -> Any:
    torch.manual_seed(0)
    return engine.models.one_layer(EngineModel, ["self_attn"])(config="shape")


def step(model: Any, *ids: int, batch: str = "batch") -> Any:
    tokens = torch.tensor(ids)
    with torch.no_grad():
        return model.forward(tokens, torch.arange(len(ids)), batch)


def test_the_op_is_called_with_what_the_engine_calls_it_with(model: Any) -> None:
    output = step(model, 5, 6, 7)
    layer = model.layer
    assert model.config == "shape"
    (theirs, ours), step_ = layer.self_attn.calls, model.last
    with torch.no_grad():
        wanted = layer.before(model.model.embed(torch.tensor([5, 6, 7])))[:, WIDTH : 2 * WIDTH]
    assert torch.equal(ours[1], wanted)  # not what the engine has written over it since
    assert not torch.equal(theirs[1], wanted)
    assert ours[2] is theirs[2]
    with torch.no_grad():
        computed = layer.self_attn.inner(wanted) + torch.arange(3)[:, None]
    assert torch.equal(output.hidden_states, computed)
    assert set(step_.calls[0].tensors()) == {"self_attn/positions", "self_attn/hidden_states"}


def test_a_slice_keeps_its_strides(model: Any) -> None:
    step(model, 1, 2)
    hidden = model.last.calls[0].kwargs["hidden_states"]
    assert hidden.stride() == (3 * WIDTH, 1)


def test_a_launch_runs_the_op_alone(model: Any) -> None:
    step(model, 1, 2)
    layer = model.layer
    calls, mlps = len(layer.self_attn.calls), layer.mlp_calls
    with torch.no_grad():
        first, second = model.launch(model.last), model.launch(model.last)
    assert len(layer.self_attn.calls) == calls + 2
    assert layer.mlp_calls == mlps
    assert torch.equal(first, second)


def test_every_launch_finds_what_the_layer_leaves_for_its_attention(
    model: Any, engine: Any
) -> None:
    step(model, 1, 2, batch="this step")
    (left,) = engine.left.inputs
    assert left.hidden_states is model.last.calls[0].kwargs["hidden_states"]
    assert left.forward_batch == "this step"
    assert left.qkv_latent_func == model.layer.self_attn.prepare_qkv_latent
    allocator = model.last.calls[0].kwargs["zero_allocator"]
    model.launch(model.last)
    assert (len(engine.left.inputs), allocator._pointer) == (2, 1)


def test_a_capture_holds_the_op_alone_over_the_warm_ups_tensors(model: Any, engine: Any) -> None:
    engine.capture = True
    step(model, 1, 2)
    hidden = model.last.calls[0].kwargs["hidden_states"]
    step(model, 3, 4)  # the runner warms up twice
    assert model.last.calls[0].kwargs["hidden_states"] is hidden
    mlps, attentions = model.layer.mlp_calls, len(model.layer.self_attn.calls)
    engine.capturing = True
    output = step(model, 9, 9)
    assert (model.layer.mlp_calls, len(model.layer.self_attn.calls)) == (mlps, attentions + 1)
    assert model.layer.self_attn.calls[-1][1] is hidden
    engine.capture = engine.capturing = False
    assert torch.equal(output.hidden_states, step(model, 3, 4).hidden_states)
    # What a replay is given is written to where the graph reads.
    kept = model.captured[2]
    with torch.no_grad():
        engine.models.overwrite(kept.calls, model.record(torch.tensor([7, 8]), torch.arange(2), 0))
    assert kept.calls[0].kwargs["hidden_states"] is hidden
    fresh = step(model, 7, 8)
    with torch.no_grad():
        assert torch.equal(model.launch(kept), fresh.hidden_states)


def test_each_size_is_captured_over_its_own_tensors(model: Any, engine: Any) -> None:
    engine.capture = True
    step(model, 1, 2)
    step(model, 1)
    assert sorted(model.captured) == [1, 2]


class Picked(NamedTuple):
    """As ``StandardTopKOutput``: what experts are called with beside the hidden states."""

    weights: Any
    ids: Any


class Experts(nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, hidden: Any, picked: Picked) -> Any:
        return hidden * picked.weights[picked.ids]


class Routed(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, _positions: Any, hidden: Any, _batch: Any) -> Any:
        picked = Picked(hidden.clone(), hidden.argsort(dim=0)[:, 0])
        out = self.experts(hidden, picked)
        picked.weights.zero_()
        picked.ids.zero_()
        return out


def test_a_replay_is_given_the_top_k_of_its_own_tokens(engine: Any) -> None:
    class Mixture(EngineModel):
        def __init__(self) -> None:
            super().__init__()
            self.model.layers[0] = Routed()

    made = engine.models.one_layer(Mixture, ["experts"])()
    engine.capture = True
    step(made, 1, 2, 3)
    kept = made.captured[3]
    before = [leaf.data_ptr() for leaf in engine.models._leaves(kept.calls[0])]
    engine.capture = False
    wanted = step(made, 9, 8, 4).hidden_states
    with torch.no_grad():
        assert not torch.equal(made.launch(kept), wanted)
        fresh = made.record(torch.tensor([9, 8, 4]), torch.arange(3), "batch")
        engine.models.overwrite(kept.calls, fresh)
        assert torch.equal(made.launch(kept), wanted)
    assert [leaf.data_ptr() for leaf in engine.models._leaves(kept.calls[0])] == before


@pytest.mark.parametrize(
    ("recipe", "holds"),
    [
        ("zeros", lambda x: bool((x == 0).all())),
        ("rows", lambda x: bool((x == x[0]).all()) and bool((x != 0).any())),
        ("normal", lambda x: 0.5 < float(x.std()) < 1.5),
    ],
)
def test_recipes_replace_floating_point_inputs_only(model: Any, recipe: str, holds: Any) -> None:
    model.recipe = recipe
    step(model, *range(16))
    tensors = model.last.calls[0].tensors()
    assert holds(tensors["self_attn/hidden_states"])
    assert torch.equal(tensors["self_attn/positions"], torch.arange(16))


def test_experts_do_not_write_over_their_input(engine: Any) -> None:
    class Experts(EngineModel):
        def __init__(self) -> None:
            super().__init__()
            self.model.layers[0].self_attn.moe_runner_config = SimpleNamespace(inplace=True)

    made = engine.models.one_layer(Experts, ["self_attn"])()
    assert made.layer.self_attn.moe_runner_config.inplace is False


def test_a_checkpoint_gives_the_weights_of_the_layer_that_the_mock_stands_for(engine: Any) -> None:
    class Loading(EngineModel):
        def load_weights(self, weights: Any, strict: bool) -> dict[str, int]:
            assert strict
            return dict(weights)

    made = engine.models.one_layer(Loading, ["self_attn"], 1)()
    stored = [("model.embed.weight", 1), ("model.layers.0.mlp.weight", 2),
              ("model.layers.1.mlp.weight", 3), ("model.layers.10.mlp.weight", 4),
              ("lm_head.weight", 5)]  # fmt: skip
    assert made.load_weights(iter(stored), strict=True) == {
        "model.embed.weight": 1, "model.layers.0.mlp.weight": 3, "lm_head.weight": 5
    }  # fmt: skip


def test_a_missing_module_is_told(engine: Any) -> None:
    with pytest.raises(BadInput, match=r"Layer of SGLang has no mlp\.experts"):
        engine.models.one_layer(EngineModel, ["self_attn", "mlp.experts"])()


def test_a_module_that_the_layer_does_not_call_is_told(engine: Any) -> None:
    made = engine.models.one_layer(EngineModel, ["self_attn.inner", "self_attn"])()
    made.layer.self_attn.forward = lambda **_: (torch.zeros(1, WIDTH), None)
    with pytest.raises(BadInput, match="called self_attn instead"):
        step(made, 1)
