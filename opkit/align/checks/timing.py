"""Do they take the same time: latency, operand data and clock, and the strict variant."""

from __future__ import annotations

import re
import statistics

from opkit.align import causes
from opkit.align.checks.subject import NAMED, Subject, all_pairs, grouped, microseconds, result
from opkit.align.policy import HARD_CEILING, Policy
from opkit.align.result import CaseMatch, CheckResult, KernelPair, Level, Outcome
from opkit.layers.manifest import Operand
from opkit.layers.op import Op, Phase
from opkit.layers.operands import degenerate
from opkit.layers.plan import DEGENERATE_INPUTS

# A kernel this short may take either of two times: on an H100 SGLang's prepare_varlen_num_blocks
# ran 0.8 µs ten times and 2.8 µs ten times, so that its median may be anything between.
TINY_NS = 5_000


def _tolerance(pair: KernelPair, policy: Policy) -> float:
    """Allowed difference of two medians in ns: relative, widened by spread, never below the
    floor."""
    assert pair.mock is not None
    assert pair.e2e is not None
    spread = policy.kernel_spread * (pair.mock.mad_ns + pair.e2e.mad_ns)
    return max(policy.kernel_latency * pair.e2e.median_ns, spread, policy.kernel_floor_us * 1000)


def _deviates(pair: KernelPair, policy: Policy) -> bool:
    if pair.mock is None or pair.e2e is None:
        return False
    difference = abs(pair.mock.median_ns - pair.e2e.median_ns)
    if pair.key and difference > _tolerance(pair, policy):
        return True
    ratio = max(pair.mock.median_ns, 1) / max(pair.e2e.median_ns, 1)
    floor = policy.odd_kernel_floor_us * 1000
    if max(pair.mock.median_ns, pair.e2e.median_ns) < TINY_NS:
        floor = max(floor, policy.kernel_spread * (pair.mock.mad_ns + pair.e2e.mad_ns))
    return max(ratio, 1 / ratio) > policy.odd_kernel_ratio and difference > floor


def _ratio_text(pair: KernelPair) -> str:
    assert pair.mock is not None
    assert pair.e2e is not None
    return (
        f"{pair.name}: mock {microseconds(pair.mock.median_ns)}, "
        f"E2E {microseconds(pair.e2e.median_ns)} ({pair.ratio:.2f}×)"
    )


def latency(subject: Subject) -> CheckResult:
    """GPU time per forward within tolerance, and each kernel within what its own spread allows."""
    policy = subject.policy
    problems, kernels = [], []
    ratios = []
    for match in subject.cases:
        ratio = match.mock.gpu_ns / max(1, match.e2e.gpu_ns)
        ratios.append(ratio)
        if abs(ratio - 1) > policy.latency or not 1 / HARD_CEILING < ratio < HARD_CEILING:
            problems.append(
                f"{match.e2e.case.label()}: GPU time per forward "
                f"{microseconds(match.mock.gpu_ns)} in the mock, "
                f"{microseconds(match.e2e.gpu_ns)} in E2E ({ratio:.3f}×)"
            )
        for pair in match.pairs:
            if pair.level in NAMED and _deviates(pair, policy):
                problems.append(f"{match.e2e.case.label()}: {_ratio_text(pair)}")
                kernels.append(pair.name)
    good = f"GPU time per forward mock/E2E {min(ratios):.3f} to {max(ratios):.3f}"
    return result("latency", problems, good, kernels, causes.SLOW_SIDE)


def data(subject: Subject) -> CheckResult:
    """Times of equal kernels agree; if not, says whether data or clock; operands are not
    degenerate."""
    policy = subject.policy
    operands = _of_this_phase(subject)
    if not operands and policy.require_operands:
        return CheckResult(
            "data",
            Outcome.INCONCLUSIVE,
            "the mock's trace does not say what its operands were",
            cause="no manifest in the mock's trace",
            next_step="make the mock's trace with `opkit align`, or set require_operands = false",
        )
    poor = [text for o in operands if (text := _degenerate(o, policy))]
    if subject.inputs in DEGENERATE_INPUTS:  # samples do not show it: a single row equals no other
        poor.insert(0, f"the mock was run with inputs {subject.inputs}, degenerate on purpose")
    if poor:
        return result("data", poor, "", (), causes.DEGENERATE)
    scaled = [text for match in subject.cases if (text := _all_heavy_scale(match, policy))]
    if scaled:
        return result("data", scaled, "", (), causes.OPERAND_DATA)
    rows = [
        (m, p)
        for m, p in all_pairs(subject)
        if p.key
        and p.level is Level.SAME
        and p.mock
        and p.e2e
        and p.mock.grid == p.e2e.grid
        and _deviates(p, policy)
    ]
    known = [p for _, p in rows if _is_data_dependent(subject.op, p)]
    good = (
        f"{len(operands)} operands sampled, none degenerate{_by_own(policy)}; equal kernels take "
        "equal time"
    )
    advice = causes.DATA_DEPENDENT if known or rows else None
    if known and subject.op.routed and subject.inputs != "captured":
        advice = causes.ROUTING
    return result("data", grouped(rows, _ratio_text), good, (p.name for _, p in rows), advice)


def _by_own(policy: Policy) -> str:
    usual = Policy()
    names = ("max_zeros", "max_equal_rows", "min_distinct")
    own = any(getattr(policy, name) != getattr(usual, name) for name in names)
    return " by a policy of your own" if own else ""


def _of_this_phase(subject: Subject) -> list[Operand]:
    """Weights, and what was sampled in the phase that is judged.

    Decode steps read a cache that prefills of the same recipe have written: for generation the
    operands of context count too. Mocks name activations by phase, as ``context o_proj.input``.
    """
    phases = {match.e2e.case.phase for match in subject.cases}
    others = (f"{Phase.GENERATION} ",) if phases == {Phase.CONTEXT} else ()
    return [o for o in subject.operands or () if not o.name.startswith(others)]


def _is_data_dependent(op: Op, pair: KernelPair) -> bool:
    side = pair.e2e or pair.mock
    return side is not None and any(re.search(p, side.name) for p in op.data_dependent)


def _degenerate(operand: Operand, policy: Policy) -> str:
    return degenerate(operand, policy.max_zeros, policy.max_equal_rows, policy.min_distinct)


def _all_heavy_scale(match: CaseMatch, policy: Policy) -> str:
    """A sentence when every heavy kernel of equal name and grid differs the same way, else
    empty."""
    ratios = [
        p.ratio
        for p in match.pairs
        if p.level is Level.SAME
        and p.ratio is not None
        and p.share >= policy.heavy_share
        and p.mock
        and p.e2e
        and p.mock.grid == p.e2e.grid
        and p.e2e.median_ns > 10 * policy.kernel_floor_us * 1000
    ]
    if len(ratios) < 3:
        return ""
    middle = statistics.median(ratios)
    alike = all((r > 1) == (middle > 1) for r in ratios)
    if not alike or abs(middle - 1) <= policy.heavy_scale:
        return ""
    return (
        f"{match.e2e.case.label()}: all {len(ratios)} heavy kernels take {middle:.2f}× E2E's time "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def strict(subject: Subject) -> CheckResult:
    """The module of the engine's own decoder layer against the mock: GPU time within the policy's
    share."""
    found = subject.strict or {}
    limit = subject.policy.strict
    problems = [
        f"{case}: decoder layer's module takes {ratio:.4f}× the mock's GPU time"
        for case, ratio in found.items()
        if abs(ratio - 1) > limit
    ]
    missing = [label for m in subject.cases if (label := m.mock.case.label()) not in found]
    if missing and not problems:
        shown = f"too few strict regions of {', '.join(missing)}" if found else ""
        return CheckResult(
            "strict",
            Outcome.INCONCLUSIVE,
            shown or "no strict regions in the mock's trace",
            next_step="run the mock with --strict",
        )
    good = f"within {limit:.0%} in {len(found)} cases"
    return result("strict", problems, good, (), causes.OTHER_KERNEL)
