"""An alignment made by hand: a failed phase with every kind of pair, and one that passed."""

from __future__ import annotations

from opkit.align.result import (
    AlignResult,
    CaseMatch,
    CheckResult,
    KernelPair,
    KernelStat,
    Level,
    Method,
    Outcome,
    PhaseResult,
    SideSummary,
)
from opkit.layers.op import Case, LaunchMode, Phase


def kernel(short: str, us: float, *, calls: int = 24, family: str = "other") -> KernelStat:
    ns = round(us * 1000)
    return KernelStat(
        name=f"void ns::{short}<(int)128>(float *)",
        short=short,
        family=family,
        grid=(132, 1, 1),
        block=(256, 1, 1),
        calls=calls,
        median_ns=ns,
        min_ns=ns - 100,
        max_ns=ns + 400,
        mad_ns=ns // 100,
    )


def pair(
    mock: KernelStat | None,
    e2e: KernelStat | None,
    level: Level,
    share: float,
    *,
    key: bool = True,
    glue: bool = False,
) -> KernelPair:
    return KernelPair(mock, e2e, level, key, glue, share)


def side(case: Case, gpu_us: float, launches: int, *, regions: int, mode: str) -> SideSummary:
    return SideSummary(
        case=case,
        mode=LaunchMode(mode),
        regions=regions,
        odd_regions=0,
        launches=launches,
        gpu_ns=round(gpu_us * 1000),
        elapsed_ns=round(gpu_us * 1030),
    )


def context_pairs() -> tuple[KernelPair, ...]:
    same = Level.SAME
    gemm, other = "nvjet_sm90_tst_256x128_64x4", "nvjet_sm90_tst_192x176_64x5"
    return (
        pair(kernel(gemm, 812.4, calls=20), kernel(gemm, 918.2), same, 0.128),
        pair(kernel("copy_kernel", 3.1, calls=20), kernel("copy_kernel", 3.2), same, 0.001,
             key=False, glue=True),
        pair(kernel(gemm, 640.0, calls=20), kernel(other, 648.3), Level.VARIANT, 0.091),
        pair(kernel("topKPerRowPrefill", 97.0, calls=20), kernel("cooperative_topk_cs8", 657.1),
             Level.ROLE, 0.092),
        pair(None, kernel("indexer_k_quant_and_cache", 4.2), Level.E2E_ONLY, 0.001),
        pair(kernel("fill_kernel", 1.4, calls=20), None, Level.MOCK_ONLY, 0.0, key=False,
             glue=True),
        pair(kernel("sparse_attn_fwd_kernel", 3310.2, calls=20),
             kernel("sparse_attn_fwd_kernel", 3785.9), same, 0.529),
        pair(kernel("gemm_bf16", 1002.1, calls=20), kernel("gemm_fp8", 1160.0), Level.DTYPE, 0.162),
    )  # fmt: skip


def failed_phase() -> PhaseResult:
    long, batch = Case(Phase.CONTEXT, 1, 4096, 0), Case(Phase.CONTEXT, 4, 1024, 0)
    small = (
        pair(kernel("gemm_bf16", 1002.1), kernel("gemm_bf16", 1010.0), Level.SAME, 0.7),
        pair(kernel("copy_kernel", 3.1), None, Level.MOCK_ONLY, 0.001, key=False, glue=True),
    )
    return PhaseResult(
        phase=Phase.CONTEXT,
        verdict=Outcome.FAIL,
        method=Method.LAUNCH_NVTX,
        attributed=0.9982,
        cases=(
            CaseMatch(
                mock=side(long, 5866.2, 7, regions=20, mode="eager"),
                e2e=side(long, 7176.9, 7, regions=24, mode="eager"),
                method=Method.LAUNCH_NVTX,
                attributed=0.9982,
                explained=0.6124,
                pairs=context_pairs(),
            ),
            CaseMatch(
                mock=side(batch, 4502.0, 30, regions=20, mode="eager"),
                e2e=side(batch, 4641.5, 30, regions=24, mode="eager"),
                method=Method.LAUNCH_NVTX,
                attributed=0.9991,
                explained=0.6402,
                pairs=small,
            ),
        ),
        checks=(
            CheckResult("evidence", Outcome.PASS, "24 regions; 99.8 % of launches attributed"),
            CheckResult(
                "missing / extra",
                Outcome.FAIL,
                "the engine launches indexer_k_quant_and_cache once a forward, the mock never",
                kernels=("indexer_k_quant_and_cache",),
                cause="the mock has no KV cache manager, so nothing writes the indexer's cache",
                next_step="give the mock the engine's KV cache and run `opkit align dsa` again",
            ),
            CheckResult(
                "data",
                Outcome.INCONCLUSIVE,
                "topKPerRowPrefill takes 97 µs against 657 µs at the same grid",
                cause="its time depends on the values",
                next_step="capture the engine's activations",
            ),
        ),
        notes=("2 steps of mixed phases were left out",),
    )


def passed_phase() -> PhaseResult:
    case = Case(Phase.GENERATION, 16, 1, 1029)
    return PhaseResult(
        phase=Phase.GENERATION,
        verdict=Outcome.PASS,
        method=Method.SEQUENCE,
        attributed=1.0,
        cases=(
            CaseMatch(
                mock=side(case, 81.0, 26, regions=30, mode="graph"),
                e2e=side(case, 83.9, 26, regions=120, mode="graph"),
                method=Method.SEQUENCE,
                attributed=1.0,
                explained=0.412,
                pairs=(
                    pair(
                        kernel("flash_mla_decode", 41.0, calls=30),
                        kernel("flash_mla_decode", 42.1, calls=120),
                        Level.SAME,
                        0.51,
                    ),
                ),
            ),
        ),
        checks=(CheckResult("latency", Outcome.PASS, "GPU time 0.97 of the engine's"),),
    )


def made_result() -> AlignResult:
    return AlignResult(
        op="dsa",
        backend="vllm",
        verdict=Outcome.FAIL,
        phases=(failed_phase(), passed_phase()),
        provenance={
            "op": "dsa",
            "backend": "vllm",
            "gpu": "NVIDIA H100 80GB HBM3",
            "versions": {"vllm": "0.24.0", "torch": "2.11.0+cu130", "nsys": "2024.2.3",
                         "opkit": "0.1.0"},
            "model": {"architecture": "DeepseekV32ForCausalLM", "layers": 4, "heads": 128,
                      "digest": "0f" * 32},
            "dtypes": {"weights": "bfloat16", "kv_cache": "bfloat16", "indexer_cache": "fp8"},
            "tp_size": 1,
            "layer_source": {"vllm/model_executor/models/deepseek_v2.py": "ab" * 32},
            "files": [
                {"name": "mock.sqlite", "sha256": "1f3a9c20" * 8, "bytes": 1000},
                {"name": "e2e.sqlite", "sha256": "9c2e77d1" * 8, "bytes": 2000},
            ],
            "policy": {"latency": 0.1, "key_share": 0.01},
            "created": "2026-11-21T10:30:00+00:00",
        },
        notes=("clocks were not locked",),
    )  # fmt: skip
