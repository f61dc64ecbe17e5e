"""The gemm op, and its mock in plain torch against a product in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import BadInput
from opkit.layers.gemm import GEMM, LINEARS
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Manifest
from opkit.layers.op import GemmCase, LaunchMode
from opkit.layers.plan import Plan, PlannedCase

BF16 = GemmCase(24, 64, 128)
FP8 = GemmCase(24, 64, 128, "float8_e4m3fn")


def plan(*cases: GemmCase, seed: int = 0) -> Plan:
    planned = tuple(PlannedCase(case, LaunchMode.EAGER) for case in cases)
    return Plan("gemm", "torch", "", planned, "mock.json", seed=seed)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed: make test-torch")


def build(made: Plan) -> Any:
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    from opkit.layers.gemm import torch as mocked

    return mocked.build(made)


@pytest.mark.parametrize(("case", "dtype"), [(BF16, "bfloat16"), (FP8, "fp8")])
def test_the_columns_are_those_of_the_table(case: GemmCase, dtype: str) -> None:
    assert GEMM.columns is not None
    found = GEMM.columns(case, Manifest("mock"))
    assert found == {"gemm_dtype": dtype, "m": 24, "n": 64, "k": 128}
    table = GEMM.table(case)
    assert tuple(found) == table.columns
    assert (table.name, table.family) == ("gemm", "gemm")


def test_the_work_is_the_least_there_can_be() -> None:
    assert GEMM.work is not None
    flops, moved = GEMM.work(GemmCase(2, 3, 5), Manifest("mock"))
    assert (flops, moved) == (60.0, 2 * (10 + 15 + 6))
    _, less = GEMM.work(GemmCase(2, 3, 5, "float8_e4m3fn"), Manifest("mock"))
    assert less == 10 + 15 + 2 * 6


@pytest.mark.parametrize("case", [BF16, FP8, GemmCase(1, 16, 256), GemmCase(100, 7, 33)])
def test_the_product_is_right(torch: Any, case: GemmCase) -> None:
    mock = build(plan(case))
    computed = mock.prepare(PlannedCase(case, LaunchMode.EAGER))()
    activations, activation_scale, weight, weight_scale = mock._operands(case)
    assert (activations.shape, weight.shape) == ((case.m, case.k), (case.n, case.k))
    exact = activations.double() @ weight.double().t()
    if case is FP8:
        exact = exact * activation_scale.double() * weight_scale.double()
    assert computed.dtype is torch.bfloat16
    assert computed.shape == (case.m, case.n)
    # bfloat16 keeps 8 bits: the output is rounded by at most 2^-9 of its value.
    assert (computed.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_the_operands_are_those_of_a_model_and_not_degenerate() -> None:
    case = GemmCase(256, 512, 1024)
    mock = build(plan(case))
    activations, _, weight, _ = mock._operands(case)
    assert weight.float().std().item() == pytest.approx(0.02, rel=0.02)
    assert activations.float().std().item() == pytest.approx(1.0, rel=0.02)
    for operand in mock.operands(PlannedCase(case, LaunchMode.EAGER)):
        assert operand.equal_rows == 0.0
        assert operand.zeros < 0.001
        assert operand.distinct > 0.01


@pytest.mark.parametrize(("inputs", "zeros"), [("zeros", 1.0), ("rows", 0.0)])
@pytest.mark.parametrize("case", [BF16, FP8])
def test_degenerate_operands_are_made_when_asked(
    torch: Any, case: GemmCase, inputs: str, zeros: float
) -> None:
    mock = build(dataclasses.replace(plan(case), inputs=inputs))
    planned = PlannedCase(case, LaunchMode.EAGER)
    weight, activations = mock.operands(planned)
    assert (activations.zeros, activations.equal_rows) == (zeros, 1.0)
    assert weight.equal_rows == 0.0
    assert torch.isfinite(mock.prepare(planned)()).all()
    assert "degenerate" in mock.describe().recipe["activations"]


def test_float8_operands_use_the_whole_range(torch: Any) -> None:
    mock = build(plan(FP8))
    activations, scale, weight, weight_scale = mock._operands(FP8)
    for values, by in ((activations, scale), (weight, weight_scale)):
        assert values.dtype is torch.float8_e4m3fn
        assert 400 <= values.float().abs().max().item() <= 448
        assert by.dtype is torch.float32
    assert (weight.float() * weight_scale).std().item() == pytest.approx(0.02, rel=0.05)


def test_values_depend_on_the_seed_and_the_shape_alone(torch: Any) -> None:
    other = GemmCase(24, 128, 128)
    first, again, seeded = build(plan(BF16)), build(plan(other, BF16)), build(plan(BF16, seed=1))
    again._operands(other)  # another case before it changes nothing
    weights = [mock._operands(BF16)[2] for mock in (first, again, seeded)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_operands_are_made_once_for_cases_that_share_them(torch: Any) -> None:
    small, large, other = GemmCase(1, 64, 128), GemmCase(50, 64, 128), GemmCase(50, 32, 128)
    mock = build(plan(small, large, other))
    one, _, weight, _ = mock._operands(small)
    fifty, _, same_weight, _ = mock._operands(large)
    _, _, other_weight, _ = mock._operands(other)
    assert weight.data_ptr() == same_weight.data_ptr() != other_weight.data_ptr()
    assert torch.equal(one, fifty[:1])
    assert one.data_ptr() == fifty.data_ptr()
    mock.close()
    assert mock._weight == (None, None, None)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (GemmCase(8, 64, 64, "int4"), "no element type 'int4'"),
        (GemmCase(8, 60, 64, "float8_e4m3fn"), "multiples of 16"),
        (GemmCase(8, 64, 60, "float8_e4m3fn"), "multiples of 16"),
    ],
)
def test_what_torch_cannot_compute_is_refused(case: GemmCase, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        build(plan(case)).prepare(PlannedCase(case, LaunchMode.EAGER))


def test_a_cpu_has_no_graphs(torch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(CaptureFailed, match="no CUDA graphs"):
        build(plan(BF16)).prepare(PlannedCase(BF16, LaunchMode.GRAPH))


def test_a_graph_is_replayed_and_freed_by_the_next_case(torch: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    mock = build(plan(BF16))
    replay = mock.prepare(PlannedCase(BF16, LaunchMode.GRAPH))
    replay()
    torch.cuda.synchronize()
    assert mock._graph is not None
    assert replay().shape == (BF16.m, BF16.n)
    mock.prepare(PlannedCase(BF16, LaunchMode.EAGER))
    assert mock._graph is None


def test_the_manifest_says_what_it_is_made_of(torch: Any) -> None:
    described = build(plan(BF16, FP8, seed=7)).describe()
    assert (described.side, described.op, described.backend) == ("mock", "gemm", "torch")
    assert described.versions["torch"] == torch.__version__
    assert described.dtypes["weights"] == "bfloat16, float8_e4m3fn"
    files = set(described.layer_source)
    assert {"opkit/layers/gemm/torch.py", "opkit/layers/gemm/__init__.py"} <= files
    assert "opkit/layers/graphs.py" in files
    assert not any("vllm" in name for name in files)
    assert "normal(0, 0.02)" in described.recipe["weights"]
    assert "seed 7" in described.recipe["weights"]


def test_the_probe_is_of_the_case_in_hand(torch: Any) -> None:
    mock = build(plan(BF16, GemmCase(100, 64, 128)))
    with pytest.raises(RuntimeError, match="needs a prepared case"):
        mock.probe()
    forward = mock.prepare(PlannedCase(BF16, LaunchMode.EAGER))
    probe = mock.probe()
    before = forward()
    assert (probe.shape, probe.dtype, probe.caches) == ((24, 64), "bfloat16", ())
    probe.inputs["input"].neg_()
    assert torch.equal(forward(), -before)


def test_what_only_an_engine_has_is_refused() -> None:
    for more in ({"strict": True}, {"inputs": "captured"}, {"engine_args": ("--a", "b")}):
        with pytest.raises(BadInput, match="the torch backend has no"):
            build(dataclasses.replace(plan(BF16), **more))


def layer(folder: Path, **more: Any) -> Any:
    """The linear layers of a small Llama in float64, and a step of it."""
    from torch_small import LLAMA, context
    from torch_small import build as built
    from torch_small import plan as planned

    case = context(2, 5, 3)
    return built(planned(folder, "gemm", LLAMA | more, case)), PlannedCase(case, LaunchMode.EAGER)


def test_a_layers_linears_are_all_multiplied(torch: Any, tmp_path: Path) -> None:
    mock, planned = layer(tmp_path)
    last = mock.prepare(planned)()
    probe = mock.probe()
    assert list(probe.inputs) == list(LINEARS)
    sizes = {"self_attn.qkv_proj": [128, 48], "self_attn.o_proj": [48, 64]}
    sizes |= {"mlp.gate_up_proj": [80, 48], "mlp.down_proj": [48, 40]}
    assert mock.describe().model["linears"] == sizes
    for (path, values), output in zip(probe.inputs.items(), mock.outputs, strict=True):
        weight = mock.module.get_submodule(path).weight
        assert list(weight.shape) == sizes[path]
        torch.testing.assert_close(output, values @ weight.T, rtol=0.0, atol=1e-12)
        assert tuple(output.shape) == (10, sizes[path][0])
    assert last is mock.outputs[-1]
    assert probe.shape == tuple(last.shape)
    inputs = list(probe.inputs.values())
    assert not torch.equal(inputs[0], inputs[2])  # equal sizes, other values


@pytest.mark.usefixtures("torch")
def test_a_rank_multiplies_its_share(tmp_path: Path) -> None:
    from torch_small import LLAMA, context
    from torch_small import build as built
    from torch_small import plan as planned

    mock = built(planned(tmp_path, "gemm", LLAMA, context(1, 2), tp_size=4))
    assert mock.describe().model["linears"] == {
        "self_attn.qkv_proj": [48, 48],  # one head, and a copy of one of the two it shares
        "self_attn.o_proj": [48, 16],
        "mlp.gate_up_proj": [20, 48],
        "mlp.down_proj": [48, 10],
    }


def test_a_layer_that_is_not_dense_is_refused(tmp_path: Path) -> None:
    from torch_small import DEEPSEEK, MIXTRAL, context
    from torch_small import plan as planned

    for config in (DEEPSEEK, MIXTRAL):
        with pytest.raises(BadInput, match="the op gemm is a dense layer's"):
            build(planned(tmp_path, "gemm", config, context(1, 2)))


@pytest.mark.usefixtures("torch")
def test_products_and_steps_go_side_by_side(tmp_path: Path) -> None:
    from torch_small import LLAMA, context
    from torch_small import plan as planned

    step = context(1, 2)
    mock = build(planned(tmp_path, "gemm", LLAMA, step, BF16, FP8))
    for case, shape in [(BF16, (24, 64)), (step, (2, 48)), (FP8, (24, 64))]:
        output = mock.prepare(PlannedCase(case, LaunchMode.EAGER))()
        assert tuple(output.shape) == mock.probe().shape == shape
        names = [item.name for item in mock.operands(PlannedCase(case, LaunchMode.EAGER))]
        assert ("weight" in names) == (case is not step)
    described = mock.describe()
    assert described.dtypes == {
        "weights": "bfloat16, float8_e4m3fn",
        "activations": "bfloat16, float8_e4m3fn",
        "kv_cache": "none",
    }
    assert list(described.model["linears"]) == list(LINEARS)
    assert "normal(0, 0.02)" in described.recipe["products: weights"]
    mock.close()
