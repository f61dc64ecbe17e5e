"""Ops and mocks: found, or refused in one sentence."""

from __future__ import annotations

import importlib.util
import re

import pytest

from opkit.errors import EXIT_BAD_INPUT, EXIT_TOOL_MISSING, BadInput, ToolMissing
from opkit.layers.dsa import DSA
from opkit.layers.op import Op
from opkit.layers.plan import Plan
from opkit.layers.registry import OPS, build_mock, find_op


def test_a_known_op_is_found() -> None:
    assert find_op("dsa") is DSA


def test_an_unknown_op_lists_the_known() -> None:
    with pytest.raises(BadInput, match=r"unknown op 'moa'; known: .*dsa") as caught:
        find_op("moa")
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_an_unknown_backend_lists_the_known(dsa_plan: Plan) -> None:
    with pytest.raises(BadInput, match=r"no mock of dsa for 'tgi'; known: vllm"):
        build_mock(DSA, "tgi", dsa_plan)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_a_missing_framework_says_what_to_install(dsa_plan: Plan) -> None:
    with pytest.raises(ToolMissing, match="needs vllm, which cannot be imported") as caught:
        build_mock(DSA, "vllm", dsa_plan)
    assert caught.value.exit_code == EXIT_TOOL_MISSING
    assert caught.value.hint is not None
    assert "pip install vllm" in caught.value.hint


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_every_pattern_is_a_regular_expression(op: Op) -> None:
    for region in op.region.values():
        assert "layer" in re.compile(region.module).groupindex
        for border in region.borders:
            re.compile(border)
    for name in op.data_dependent:
        re.compile(name)


@pytest.mark.parametrize("backend", ["vllm", "sglang", "trtllm"])
def test_dsa_module_is_the_layers_attention_and_nothing_below(backend: str) -> None:
    pattern = re.compile(DSA.region[backend].module)
    found = pattern.search("DeepseekV32ForCausalLM.model.layers.13.self_attn")
    assert found is not None
    assert found["layer"] == "13"
    assert pattern.search("DeepseekV32ForCausalLM.model.layers.13.self_attn.o_proj") is None
    assert pattern.search("DeepseekV32ForCausalLM.model.layers.13.mlp") is None


@pytest.mark.parametrize(
    "kernel",
    [
        "void vllm::topKPerRowPrefill<512, true>(const float *)",
        "void vllm::topKPerRowDecode<512, true, false>(const float *)",
        "cooperative_topk_cs8",
        "void sm90::fwd::sparse_attn_fwd_kernel<64, 128>(SparsePrefillParams)",
        "flash_fwd_splitkv_mla_fp8_sparse_kernel",
    ],
)
def test_data_dependent_kernels_are_named(kernel: str) -> None:
    assert any(re.search(pattern, kernel) for pattern in DSA.data_dependent)
