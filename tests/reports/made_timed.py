"""The made result as today's opkit judges it: with starts, samples and what ran beside the op."""

from __future__ import annotations

from dataclasses import replace

from made_result import made_result

from opkit.align.result import (
    AlignResult,
    CaseMatch,
    KernelPair,
    KernelShare,
    KernelStat,
    SideSummary,
)

GAP_NS = 1_700


def timed_result() -> AlignResult:
    result = made_result()
    phases = tuple(replace(phase, cases=tuple(map(_timed, phase.cases))) for phase in result.phases)
    return replace(result, phases=phases)


def _timed(case: CaseMatch) -> CaseMatch:
    at = {"mock": 0, "e2e": 0}

    def placed(kernel: KernelStat | None, side: str) -> KernelStat | None:
        if kernel is None:
            return None
        start = at[side]
        at[side] += kernel.median_ns + GAP_NS
        return replace(kernel, offset_ns=start)

    pairs: list[KernelPair] = [
        replace(pair, mock=placed(pair.mock, "mock"), e2e=placed(pair.e2e, "e2e"))
        for pair in case.pairs
    ]
    return replace(
        case,
        pairs=tuple(pairs),
        mock=_sampled(case.mock),
        e2e=_sampled(case.e2e),
        steps=6,
        unattributed=(KernelShare("lost_kernel", 3, 4_500, 0.0004),),
        outside=(KernelShare("fused_moe_kernel", 48, 2_103_720, 0.3144),),
    )


def _sampled(side: SideSummary) -> SideSummary:
    return replace(
        side, samples_ns=tuple(side.gpu_ns + 100 * (n % 7 - 3) for n in range(side.regions))
    )
