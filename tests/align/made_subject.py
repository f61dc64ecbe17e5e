"""A phase whose mock and engine agree, and ways to change one thing of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opkit.align.checks import Subject, run_checks
from opkit.align.policy import Policy
from opkit.align.result import (
    CaseMatch,
    CheckResult,
    KernelPair,
    KernelStat,
    Level,
    Method,
    SideSummary,
)
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Operand
from opkit.layers.op import Case, LaunchMode, Phase

CASE = Case(Phase.CONTEXT, 1, 4096, 0)
OPERAND = Operand("o_proj.weight", (7168, 16384), "bfloat16", 0.9, 0.0, 0.0)


def stat(name: str, us: float, *, mad_us: float = 0.05, **more: Any) -> KernelStat:
    ns = round(us * 1000)
    made = KernelStat(
        name=f"void ns::{name}(float *)", short=name, family="other", grid=(132, 1, 1),
        block=(256, 1, 1), calls=12, median_ns=ns, min_ns=ns - 50, max_ns=ns + 50,
        mad_ns=round(mad_us * 1000),
    )  # fmt: skip
    return replace(made, **more)


def same(name: str, us: float, *, other_us: float | None = None, **more: Any) -> KernelPair:
    """A matched pair; ``other_us`` is the mock's time where it differs."""
    mock = stat(name, us if other_us is None else other_us)
    pair = KernelPair(mock, stat(name, us), Level.SAME, key=True, glue=False, share=us / 1000)
    return replace(pair, **more)


def alone(name: str, us: float, level: Level, *, family: str = "other", **more: Any) -> KernelPair:
    one = stat(name, us, family=family)
    mock, e2e = (one, None) if level is Level.MOCK_ONLY else (None, one)
    pair = KernelPair(mock, e2e, level, key=True, glue=False, share=us / 1000)
    return replace(pair, **more)


def glue(pair: KernelPair) -> KernelPair:
    """The same as an element-wise kernel below the share of a key kernel."""
    return replace(pair, glue=True, key=False)


PAIRS = (
    same("nvjet_qkv", 100.0),
    same("rms_norm_kernel", 3.0),
    glue(same("copy_kernel", 2.0)),
    same("concat_and_cache_mla_kernel", 3.0),
    same("topKPerRowPrefill", 90.0),
    same("sparse_attn_fwd_kernel", 600.0),
    same("nvjet_o_proj", 200.0),
)


def side(pairs: tuple[KernelPair, ...], which: str, **more: Any) -> SideSummary:
    stats = [s for p in pairs if (s := getattr(p, which)) is not None]
    total = sum(s.median_ns for s in stats)
    made = SideSummary(
        case=CASE, mode=LaunchMode.EAGER, regions=12, odd_regions=0, launches=len(stats),
        gpu_ns=total, elapsed_ns=total,
    )  # fmt: skip
    return replace(made, **more)


def case_match(
    pairs: tuple[KernelPair, ...] = PAIRS,
    *,
    mock: dict[str, Any] | None = None,
    e2e: dict[str, Any] | None = None,
    **more: Any,
) -> CaseMatch:
    made = CaseMatch(
        side(pairs, "mock", **(mock or {})),
        side(pairs, "e2e", **(e2e or {})),
        Method.LAUNCH_NVTX,
        attributed=1.0,
        explained=0.6,
        pairs=pairs,
    )
    return replace(made, **more)


def subject(*cases: CaseMatch, policy: Policy | None = None, **more: Any) -> Subject:
    made = Subject(DSA, cases or (case_match(),), policy or Policy(), operands=(OPERAND,))
    return replace(made, **more)


def checked(made: Subject) -> dict[str, CheckResult]:
    return {result.check: result for result in run_checks(made)}


def not_passed(made: Subject) -> dict[str, str]:
    """The checks that did not pass, and how."""
    return {name: str(c.outcome) for name, c in checked(made).items() if c.outcome != "pass"}


def with_pair(pair: KernelPair, at: int = 2) -> tuple[KernelPair, ...]:
    """The pairs with one more in their midst."""
    return (*PAIRS[:at], pair, *PAIRS[at:])


def changed(at: int, pair: KernelPair) -> tuple[KernelPair, ...]:
    """The pairs with one replaced."""
    return (*PAIRS[:at], pair, *PAIRS[at + 1 :])
