"""What all mocks of the torch backend share: probe, inputs, recipes, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

from torch_small import (  # noqa: E402
    DEEPSEEK,
    LLAMA,
    MIXTRAL,
    SPARSE,
    build,
    context,
    generation,
    plan,
    run,
)

from opkit.errors import BadInput  # noqa: E402
from opkit.layers.backends.torch.draw import Inputs, Weights  # noqa: E402
from opkit.layers.graphs import CaptureFailed  # noqa: E402
from opkit.layers.manifest import manifest_from_json  # noqa: E402
from opkit.layers.op import GemmCase, LaunchMode, MoeCase  # noqa: E402
from opkit.layers.plan import PlannedCase  # noqa: E402
from opkit.layers.registry import OPS, build_mock  # noqa: E402

CPU = torch.device("cpu")
MODELS = {"dsa": SPARSE, "mla": DEEPSEEK, "gqa": LLAMA, "moe": MIXTRAL, "gemm": LLAMA}
CACHES = {"dsa": ["kv_cache", "indexer_cache"], "mla": ["kv_cache"], "gqa": ["kv_cache"]}
WIDTHS = {"dsa": 48, "mla": 48, "gqa": 64, "moe": 48, "gemm": 48}


@pytest.mark.parametrize("op", MODELS)
@pytest.mark.parametrize("case", [context(2, 3, 4), generation(3, 6)])
def test_the_probe_says_what_is_computed(tmp_path: Path, op: str, case: Any) -> None:
    mock = build(plan(tmp_path, op, MODELS[op], case, context(4, 16)), None)
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    probe = mock.probe()
    output = forward()
    assert probe.shape == tuple(output.shape) == (case.batch * case.tokens, WIDTHS[op])
    assert (probe.dtype, output.dtype) == ("bfloat16", torch.bfloat16)
    assert torch.isfinite(output).all()
    assert (output == 0).float().mean() < 0.01
    assert torch.equal(forward(), output)  # as often as one likes
    assert [cache.name for cache in probe.caches] == CACHES.get(op, [])
    for values in probe.inputs.values():
        values.neg_()  # the forward reads these very tensors
    assert not torch.equal(forward(), output)


@pytest.mark.parametrize("op", CACHES)
@pytest.mark.parametrize("case", [context(2, 3, 4), generation(3, 6)])
def test_caches_are_written_and_read(tmp_path: Path, op: str, case: Any) -> None:
    config = MODELS[op] | ({"index_topk": 64} if op == "dsa" else {})  # all is read
    mock = build(plan(tmp_path, op, config, case, context(4, 16)))
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    before = forward()
    length = case.past + case.tokens
    for cache in mock.probe().caches:
        assert len(cache.tensor) == 64  # of the largest case
        requests = range(case.batch)
        assert set(cache.past) == {
            request * length + place for request in requests for place in range(case.past)
        }
        assert set(cache.new) == set(range(case.batch * length)) - set(cache.past)
        filled = cache.tensor[: case.batch * length].clone()
        assert filled.flatten(1).abs().amax(dim=1).min() > 0
        cache.tensor[list(cache.new)] = 0.0
        assert torch.equal(forward(), before)
        assert torch.equal(cache.tensor[: case.batch * length], filled)
    kept = mock.probe().caches[0]
    kept.tensor[list(kept.past)] = kept.tensor[list(kept.past)].flip(0)
    assert not torch.allclose(forward(), before)
    mock.prepare(PlannedCase(case, LaunchMode.EAGER))  # and are filled anew
    assert torch.equal(forward(), before)


def test_the_indexers_cache_decides_what_is_read(tmp_path: Path) -> None:
    case = generation(1, 40)
    mock = build(plan(tmp_path, "dsa", SPARSE, case))
    forward = mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    before = forward()
    keys = mock.probe().caches[1]
    keys.tensor[:40] = keys.tensor[:40].flip(0)
    assert not torch.allclose(forward(), before)


def test_a_probe_needs_a_case(tmp_path: Path) -> None:
    for op in ("dsa", "gemm"):
        with pytest.raises(RuntimeError, match="needs a prepared case"):
            build(plan(tmp_path, op, MODELS[op], context(1, 2))).probe()


@pytest.mark.parametrize("op", MODELS)
def test_the_manifest_serves_the_table(tmp_path: Path, op: str) -> None:
    case = context(2, 3)
    mock = build(plan(tmp_path, op, MODELS[op], case, seed=3), None)
    run(mock, case)
    described = mock.describe()
    path = tmp_path / "mock.opkit.json"
    described.write(path)
    assert manifest_from_json(path.read_text(), "mock") == described
    assert (described.side, described.op, described.backend) == ("mock", op, "torch")
    assert described.versions["torch"] == torch.__version__
    assert described.model["architecture"] == MODELS[op]["architectures"][0]
    assert described.model["num_hidden_layers"] == 3
    assert len(described.model["config_sha256"]) == 64
    assert described.dtypes["weights"] == described.dtypes["activations"] == "bfloat16"
    assert "seed=3" in described.recipe["activations"]
    assert f"opkit/layers/{op}/torch.py" in described.layer_source or op in ("dsa", "mla")
    assert "opkit/layers/backends/torch/draw.py" in described.layer_source
    columns, work = OPS[op].columns, OPS[op].work
    assert columns is not None
    assert work is not None
    row: Any = {"moe": MoeCase(6), "gemm": GemmCase(6, 8, 8)}.get(op, case)
    assert set(columns(row, described)) == set(OPS[op].table(row).columns)
    flops, moved = work(row, described)
    assert flops > 0
    assert moved >= 0


def test_the_notes_say_what_is_left_out(tmp_path: Path) -> None:
    config = SPARSE | {"quantization_config": {"quant_method": "fp8"}}
    notes = " ".join(build(plan(tmp_path, "dsa", config, context(1, 2)), None).describe().notes)
    assert "FP8 quantisation" in notes
    assert "Hadamard" in notes
    assert "quantization_config is left out: all products are bfloat16" in notes


@pytest.mark.parametrize("op", MODELS)
def test_what_only_an_engine_has_is_refused(tmp_path: Path, op: str) -> None:
    for more, reason in [
        ({"inputs": "captured", "captured": "folder"}, "no engine whose inputs"),
        ({"strict": True}, "no engine whose decoder layer"),
        ({"engine_args": ("--max-num-seqs", "4")}, "no server that would read --max-num-seqs 4"),
    ]:
        with pytest.raises(BadInput, match=reason):
            build(plan(tmp_path, op, MODELS[op], context(1, 2), **more))


@pytest.mark.parametrize("op", MODELS)
def test_a_cpu_has_no_graphs(tmp_path: Path, op: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    case = generation(1, 2)
    with pytest.raises(CaptureFailed, match="a CPU has no CUDA graphs"):
        build(plan(tmp_path, op, MODELS[op], case)).prepare(PlannedCase(case, LaunchMode.GRAPH))


@pytest.mark.parametrize("op", MODELS)
def test_a_graph_gives_what_the_forward_gives(tmp_path: Path, op: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    case = generation(3, 6)
    mock = build(plan(tmp_path, op, MODELS[op], case), None)
    eager = mock.prepare(PlannedCase(case, LaunchMode.EAGER))().clone()
    replay = mock.prepare(PlannedCase(case, LaunchMode.GRAPH))
    torch.testing.assert_close(replay(), eager)
    mock.close()


@pytest.mark.parametrize("op", ["dsa", "mla", "gqa"])
def test_a_case_of_another_op_is_refused(tmp_path: Path, op: str) -> None:
    with pytest.raises(BadInput, match=f"{op} has no case like 8 balanced"):
        build(plan(tmp_path, op, MODELS[op], MoeCase(8)))


def test_more_than_the_memory_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = MIXTRAL | {"hidden_size": 2**16, "intermediate_size": 2**20, "head_dim": 128}
    for made in (
        plan(tmp_path / "moe", "moe", huge, context(1, 2)),
        plan(tmp_path / "gqa", "gqa", LLAMA, context(2**20, 2**16)),
    ):
        monkeypatch.setattr(Weights, "matrix", lambda *_: pytest.fail("nothing may be drawn"))
        with pytest.raises(BadInput, match=r"GiB for weights and caches, this (cpu|cuda) has"):
            build_mock(OPS[made.op], "torch", made)
        monkeypatch.undo()


def test_the_counts_of_weights_are_right(tmp_path: Path) -> None:
    for op, config in MODELS.items():
        mock = build(plan(tmp_path, op, config, context(1, 2)))
        matrices = [weight for weight in mock.module.parameters() if weight.ndim > 1]
        assert mock.elements() == sum(weight.numel() for weight in matrices)


def test_close_gives_all_back(tmp_path: Path) -> None:
    case = context(1, 2)
    mock = build(plan(tmp_path, "dsa", SPARSE, case))
    run(mock, case)
    mock.close()
    assert mock.module is None
    assert mock.inputs == {}


@pytest.mark.parametrize("op", MODELS)
def test_operands_are_not_degenerate_unless_asked(tmp_path: Path, op: str) -> None:
    case = PlannedCase(context(2, 40), LaunchMode.EAGER)
    config = MODELS[op] | {"hidden_size": 1024, "intermediate_size": 512}
    config |= {"q_lora_rank": 1024} if "q_lora_rank" in config else {}
    for inputs in ("tokens", "normal", "rows", "zeros"):
        mock = build(plan(tmp_path, op, config, case.case, inputs=inputs), None)
        operands = mock.operands(case)
        assert operands
        assert len({operand.name for operand in operands}) == len(operands)
        fed = [operand for operand in operands if "input" in operand.name or op == "gqa"]
        for operand in fed:
            assert (operand.zeros > 0.99) == (inputs == "zeros")
            assert (operand.equal_rows == 1.0) == (inputs in ("zeros", "rows"))


def test_every_product_is_sampled(tmp_path: Path) -> None:
    case = context(2, 40)
    mock = build(plan(tmp_path, "dsa", SPARSE, case), None)
    found = {item.name: item for item in mock.operands(PlannedCase(case, LaunchMode.EAGER))}
    matrices = [name for name, weight in mock.module.named_parameters() if weight.ndim > 1]
    assert set(found) == {
        *matrices,
        # Absorbed into queries and outputs, kv_b_proj is not called.
        *(f"context {name.removesuffix('weight')}input" for name in matrices if "kv_b" not in name),
        *(f"context indexer.score.{name}" for name in ("q", "k", "weights")),
    }
    assert found["context indexer.score.q"].shape == (80, 6, 16)
    assert found["q_b_proj.weight"].shape == (96, 24)
    assert all(item.equal_rows < 0.1 and item.zeros < 0.1 for item in found.values())


def inputs(kind: str, width: int = 32, seed: int = 0, name: str = "x") -> Inputs:
    return Inputs(kind, seed, 100_000, width, CPU, torch.float32, name)


@pytest.mark.parametrize("kind", ["tokens", "normal"])
def test_a_position_has_one_row_in_every_case(kind: str) -> None:
    drawn = inputs(kind)
    whole = drawn.rows(range(3), 0, 150).view(3, 150, 32)
    assert torch.equal(drawn.rows(range(3), 70, 80).view(3, 80, 32), whole[:, 70:])
    assert torch.equal(inputs(kind).rows(range(1, 2), 149, 1), whole[1, 149:])
    assert not torch.equal(inputs(kind, seed=1).rows(range(3), 0, 150), whole.flatten(0, 1))
    assert not torch.equal(inputs(kind, name="y").rows(range(3), 0, 150), whole.flatten(0, 1))


@pytest.mark.parametrize("kind", ["tokens", "normal"])
def test_rows_are_distinct_and_of_variance_1(kind: str) -> None:
    rows = inputs(kind, 256).rows(range(4), 0, 500)
    assert len(rows.unique(dim=0)) > 1970  # of 2,000; some tokens come twice
    assert rows.std().item() == pytest.approx(1.0, rel=0.02)
    assert rows.mean().item() == pytest.approx(0.0, abs=0.02)


def test_weights_follow_from_seed_and_name() -> None:
    weights = Weights(0, CPU, torch.float32)
    one = weights.matrix("one", 200, 400)
    weights.matrix("other", 200, 400)
    assert torch.equal(one, Weights(0, CPU, torch.float32).matrix("one", 200, 400))
    assert not torch.equal(one, weights.matrix("other", 200, 400))
    assert not torch.equal(one, Weights(1, CPU, torch.float32).matrix("one", 200, 400))
    assert one.std().item() == pytest.approx(400**-0.5, rel=0.02)
    gpt = Weights(0, CPU, torch.float32, "normal_0.02")
    assert gpt.matrix("one", 200, 400).std().item() == pytest.approx(0.02, rel=0.02)
    assert "normal(0, 0.02)" in gpt.described()
    stack = weights.matrix("experts", 3, 40, 50)
    assert not torch.equal(stack[0], stack[1])


def test_norms_are_not_all_ones() -> None:
    norm = Weights(0, CPU, torch.float32).layer_norm("norm", 2000, 1e-6)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.02)
    assert norm.bias.mean().item() == pytest.approx(0.0, abs=0.02)
    assert norm.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(norm.weight - 1, norm.bias)


def test_the_model_is_read_from_its_folder(tmp_path: Path) -> None:
    made = plan(tmp_path, "mla", DEEPSEEK, context(1, 2))
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK | {"architectures": ["Unknown"]}))
    with pytest.raises(BadInput, match="unknown architecture 'Unknown'"):
        build(made)


STEPS = [
    (op, case)
    for op in MODELS
    for case in (context(2, 6, 3), context(2, 6), generation(3, 6))
    # There gqa takes torch's causal_lower_right, a tensor class that fake tensors cannot hold.
    if (op, case) != ("gqa", context(2, 6, 3))
]


@pytest.mark.parametrize(("op", "case"), STEPS)
def test_the_host_is_asked_for_no_value(tmp_path: Path, op: str, case: Any) -> None:
    """What a CUDA graph cannot hold: tensors without values would be asked for theirs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mock = build(plan(tmp_path, op, MODELS[op], case), None)
    mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        output = mock.launch()
    assert tuple(output.shape) == mock.probe().shape


def test_experts_one_by_one_ask_the_host(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    case = context(2, 6)
    mock = build(plan(tmp_path, "moe", MIXTRAL, case))
    mock.prepare(PlannedCase(case, LaunchMode.EAGER))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        pytest.raises(DataDependentOutputException),
    ):
        mock.launch()
