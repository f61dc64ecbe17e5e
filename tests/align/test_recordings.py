"""Verdicts on real recordings: the true pair passes, every wrong mock fails for its own reason.

Where each recording comes from is told in ``tests/traces/README.md``.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest

from opkit.align.judge import Question, judge
from opkit.align.policy import Policy, load_policy
from opkit.align.result import AlignResult, Level, Method, Outcome, PhaseResult
from opkit.layers.op import Phase
from opkit.layers.registry import find_op
from opkit.nsys_parsers.trace import open_trace

TRACES = Path(__file__).parents[1] / "traces"
RECORDED = Path(__file__).parents[2] / "opkit" / "recorded"
MOCK, E2E = (RECORDED / f"dsa-vllm-h100-{side}.sqlite.gz" for side in ("mock", "e2e"))
PROCESS_MOCK, PROCESS_E2E = (TRACES / f"h100-process-{side}.sqlite.gz" for side in ("mock", "e2e"))
STRICT = {side: TRACES / f"h100-strict-{side}.sqlite.gz" for side in ("mock", "strict", "e2e")}
CONTEXT, GENERATION = Phase.CONTEXT, Phase.GENERATION

# Fault → phase → (a check that must fail, a kernel or word it must name, the cause it must give).
REASONS: dict[str, dict[Phase, tuple[str, str, str]]] = {
    "fp8_kv": {
        CONTEXT: ("names", "concat_and_cache_ds_mla_kernel", "KV cache has another dtype"),
        GENERATION: ("names", "concat_and_cache_ds_mla_kernel", "KV cache has another dtype"),
    },
    "eager": {GENERATION: ("launch", "mock eager, E2E graph", "CUDA graph replay")},
    "half_heads": {
        CONTEXT: ("launch", "ConcatMLAQKernel: grid (8192, 1, 1)", "local head count"),
        GENERATION: ("launch", "RotaryPosIds", "local head count"),
    },
    "no_indexer": {
        CONTEXT: ("missing/extra", "missing in the mock", "skips the indexer"),
        GENERATION: ("missing/extra", "missing in the mock", "skips the indexer"),
    },
    "batch": {
        CONTEXT: ("launch", "grid (2048, 1, 1)", "other grids or blocks"),
        GENERATION: ("launch", "grid (4, 1, 1)", "other grids or blocks"),
    },
    "batch_labelled": {
        CONTEXT: ("launch", "mock ran 2 × 1,024, E2E ran 1 × 1,024", "ran other shapes"),
        GENERATION: ("launch", "mock ran 2 × 1 @ 517", "ran other shapes"),
    },
    "extra_elementwise": {
        CONTEXT: ("missing/extra", "extra in the mock: vectorized_elementwise", "extra work"),
        GENERATION: ("missing/extra", "extra in the mock: vectorized_elementwise", "extra work"),
    },
    "norm_fp32": {
        CONTEXT: ("names", "rms_norm_kernel: e2e only", "norm runs as several operations"),
        GENERATION: ("names", "rms_norm_kernel: e2e only", "norm runs as several operations"),
    },
    "split_fused": {
        CONTEXT: ("names", "mock only", "fused kernel"),
        GENERATION: ("names", "fused_a_gemm_kernel: e2e only", "fused kernel"),
    },
    "zero_activations": {
        CONTEXT: ("data", "fused_qkv_a_proj.input", "degenerate"),
        GENERATION: ("data", "100% zeros", "degenerate"),
    },
    "equal_rows": {
        CONTEXT: ("data", "sampled rows are equal", "degenerate"),
        GENERATION: ("data", "sampled rows are equal", "degenerate"),
    },
    "zero_weights": {
        CONTEXT: ("data", "fused_qkv_a_proj.weight", "degenerate"),
        GENERATION: ("data", "fused_qkv_a_proj.weight", "degenerate"),
    },
    "no_kv_write": {
        CONTEXT: ("names", "concat_and_cache_mla_kernel: e2e only", "KV cache manager"),
        GENERATION: ("names", "concat_and_cache_mla_kernel: e2e only", "KV cache manager"),
    },
    "no_index_write": {
        CONTEXT: ("names", "indexer_k_quant_and_cache_kernel: e2e only", "indexer"),
        GENERATION: ("names", "indexer_k_quant_and_cache_kernel: e2e only", "indexer"),
    },
}


@cache
def align(
    mock: Path, e2e: Path, strict: Path | None = None, method: Method | None = None
) -> AlignResult:
    """The verdict on two recordings, judged once."""
    return judge(Question(find_op("dsa"), mock, (e2e,), strict=strict, method=method))


def phase_of(result: AlignResult, phase: Phase) -> PhaseResult:
    return next(part for part in result.phases if part.phase is phase)


def test_the_true_pair_passes_with_every_kernel_the_same() -> None:
    result = align(MOCK, E2E)
    assert result.verdict is Outcome.PASS
    levels = {pair.level for part in result.phases for case in part.cases for pair in case.pairs}
    assert levels == {Level.SAME}
    shapes = [[case.mock.case.label() for case in part.cases] for part in result.phases]
    assert shapes == [
        ["1 × 512", "1 × 1,024", "1 × 4,096", "2 × 512", "4 × 1,024"],
        ["1 × 1 @ 517", "1 × 1 @ 1,029", "1 × 1 @ 4,101", "4 × 1 @ 1,029", "16 × 1 @ 518"],
    ]


def test_each_way_of_finding_regions_has_its_recording() -> None:
    late, whole = align(MOCK, E2E), align(PROCESS_MOCK, PROCESS_E2E)
    assert phase_of(late, CONTEXT).method is Method.LAUNCH_NVTX
    assert phase_of(late, GENERATION).method is Method.SEQUENCE
    assert phase_of(whole, GENERATION).method is Method.NODE_NVTX
    assert (late.verdict, whole.verdict) == (Outcome.PASS, Outcome.PASS)


def test_node_ranges_and_sequence_find_the_same_kernels() -> None:
    by_node = phase_of(align(PROCESS_MOCK, PROCESS_E2E), GENERATION)
    by_sequence = phase_of(align(PROCESS_MOCK, PROCESS_E2E, method=Method.SEQUENCE), GENERATION)
    assert by_sequence.method is Method.SEQUENCE
    assert len(by_node.cases) == len(by_sequence.cases) == 5
    for node, found in zip(by_node.cases, by_sequence.cases, strict=True):
        # Four layers a step by node, three by sequence: the first has no border on its left.
        assert found.e2e.regions * 4 == node.e2e.regions * 3
        assert [p.e2e.name for p in found.pairs if p.e2e] == [
            p.e2e.name for p in node.pairs if p.e2e
        ]
        assert found.e2e.gpu_ns == pytest.approx(node.e2e.gpu_ns, rel=0.01)


def test_launch_ranges_and_sequence_find_the_same_kernels() -> None:
    by_launch = phase_of(align(MOCK, E2E), CONTEXT)
    by_sequence = phase_of(align(MOCK, E2E, method=Method.SEQUENCE), CONTEXT)
    assert [c.e2e.launches for c in by_sequence.cases] == [c.e2e.launches for c in by_launch.cases]


@pytest.mark.parametrize("fault", sorted(REASONS))
def test_a_wrong_mock_fails_for_its_own_reason(fault: str) -> None:
    result = align(TRACES / "wrong" / f"{fault}.sqlite.gz", TRACES / "wrong-e2e.sqlite.gz")
    assert result.verdict is Outcome.FAIL
    for phase, (name, detail, cause) in REASONS[fault].items():
        check = next(c for c in phase_of(result, phase).checks if c.check == name)
        assert check.outcome is Outcome.FAIL
        assert detail in check.detail
        assert cause in check.cause
        assert check.next_step


def test_every_recorded_fault_has_its_reason() -> None:
    recorded = {path.name.removesuffix(".sqlite.gz") for path in (TRACES / "wrong").iterdir()}
    assert recorded == set(REASONS)


def test_an_eager_mock_is_right_where_the_engine_is_eager() -> None:
    result = align(TRACES / "wrong" / "eager.sqlite.gz", TRACES / "wrong-e2e.sqlite.gz")
    assert phase_of(result, CONTEXT).verdict is Outcome.PASS


def test_strict_holds_the_mock_to_the_decoder_layers_own_module() -> None:
    result = align(STRICT["mock"], STRICT["e2e"], STRICT["strict"])
    for phase in (CONTEXT, GENERATION):
        check = phase_of(result, phase).checks[-1]
        assert (check.check, check.outcome) == ("strict", Outcome.PASS)


def test_a_mock_that_writes_a_buffer_first_fails_on_its_first_kernels() -> None:
    # This mock wrote a buffer before each iteration; write-back of its lines is the likely cause.
    generation = phase_of(align(STRICT["mock"], STRICT["e2e"]), GENERATION)
    latency = next(c for c in generation.checks if c.check == "latency")
    assert latency.outcome is Outcome.FAIL
    assert "fused_a_gemm_kernel" in latency.kernels


def test_a_tighter_policy_fails_the_true_pair(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("latency = 0.001\n")
    policy = load_policy(path)
    assert policy.digest() != Policy().digest()
    result = judge(Question(find_op("dsa"), MOCK, (E2E,), policy=policy))
    assert result.verdict is Outcome.FAIL


def test_kernels_that_nsys_calls_copies_are_set_aside_and_told() -> None:
    generation = phase_of(align(MOCK, E2E), GENERATION)
    assert sum(case.e2e.misreported for case in generation.cases) == 11
    assert "11 regions set aside" in generation.checks[0].detail


def test_kernel_sums_equal_nsys_stats() -> None:
    # tests/traces/nsys-stats-e2e.csv: nsys 2024.2.3, `nsys stats --report cuda_gpu_kern_sum
    # --format csv` on the bundled E2E recording.
    with (TRACES / "nsys-stats-e2e.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {row["Name"]: (int(row["Instances"]), int(row["Total Time (ns)"])) for row in rows}
    with open_trace(E2E) as trace:
        found = trace.rows(
            'SELECT name, count(*), sum("end" - start)::BIGINT FROM kernel '
            "WHERE kind = 'kernel' GROUP BY 1"
        )
    assert {name: (calls, total) for name, calls, total in found} == expected
    assert len(expected) > 60
