"""Why *launch* failed: another shape, mode, grid, or a kernel that was tuned anew; and evidence of
one step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_subject import CASE, PAIRS, case_match, changed, checked, not_passed, same, stat, subject

from opkit.align import causes
from opkit.align.judge import Question, judge
from opkit.align.result import CaseMatch, KernelPair
from opkit.layers.dsa import DSA
from opkit.layers.op import LaunchMode, Phase

TRACES = Path(__file__).parents[1] / "traces"
SMALL = (64, 1, 1)


def regrid(at: int, name: str, family: str = "other") -> tuple[KernelPair, ...]:
    """The pairs with one renamed, whose mock has another grid."""
    pair = same(name, 3.0)
    assert pair.mock
    assert pair.e2e
    mock, e2e = (replace(side, family=family) for side in (pair.mock, pair.e2e))
    return changed(at, replace(pair, mock=replace(mock, grid=SMALL), e2e=e2e))


@pytest.mark.parametrize(
    ("pairs", "more", "advice"),
    [
        (regrid(1, "rms_norm_kernel"), {}, causes.OTHER_GRIDS),
        (regrid(1, "_act_kernel", "triton"), {}, causes.AUTOTUNED),
        (regrid(1, "triton_poi_fused_copy_0", "cast"), {}, causes.AUTOTUNED),
        (regrid(1, "_act_kernel", "triton"), {"mode": LaunchMode.GRAPH}, causes.EAGER_NOT_GRAPH),
        (regrid(1, "_act_kernel", "triton"), {"case": replace(CASE, batch=2)}, causes.OTHER_SHAPE),
        (PAIRS, {"case": replace(CASE, batch=2)}, causes.OTHER_SHAPE),
    ],
)
def test_the_cause_says_what_differs(
    pairs: tuple[KernelPair, ...], more: dict[str, object], advice: causes.Advice
) -> None:
    found = checked(subject(case_match(pairs, mock=more)))["launch"]
    assert (found.cause, found.next_step) == (advice.cause, advice.next_step)


def test_one_kernel_that_is_not_tritons_is_no_tuning() -> None:
    both = list(regrid(1, "_act_kernel", "triton"))
    both[5] = replace(PAIRS[5], mock=stat("sparse_attn_fwd_kernel", 600.0, block=SMALL))
    assert checked(subject(case_match(tuple(both))))["launch"].cause == causes.OTHER_GRIDS.cause


def test_no_advice_points_at_what_the_report_does_not_show() -> None:
    """The header shows the mock's sizes and tp, and no shapes of E2E."""
    advices = [a for a in vars(causes).values() if isinstance(a, causes.Advice)]
    assert len(advices) > 20
    for advice in advices:
        assert "header" not in advice.cause + advice.next_step


def test_another_tile_of_a_tuned_kernel_is_led_to_the_host() -> None:
    """SGLang's engine of one day beside the mock of another: one Inductor kernel differs."""
    result = judge(
        Question(
            DSA,
            TRACES / "dsa-sglang-pair-mock.sqlite.gz",
            (TRACES / "dsa-sglang-h100-e2e.sqlite.gz",),
            backend="sglang",
        )
    )
    context = next(phase for phase in result.phases if phase.phase is Phase.CONTEXT)
    (failed,) = (check for check in context.checks if check.outcome == "fail")
    assert failed.check == "launch"
    assert failed.kernels == ("triton_poi_fused_mul_unsqueeze_0",)
    assert failed.cause == causes.AUTOTUNED.cause
    assert "one host" in failed.next_step


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((3, 4), ""),
        ((0, 0), ""),  # stored by an older opkit
        ((1, 4), "; of one step: 1 × 4,096"),
        ((4, 1), "; of one step: 2 × 4,096"),
        ((1, 1), "; each case of one step"),
    ],
)
def test_evidence_says_what_rests_on_one_step(steps: tuple[int, int], said: str) -> None:
    cases: list[CaseMatch] = []
    for batch, count in zip((1, 2), steps, strict=True):
        case = {"case": replace(CASE, batch=batch)}
        cases.append(case_match(mock=case, e2e=case, steps=count))
    made = subject(*cases)
    assert not_passed(made) == {}
    assert checked(made)["evidence"].detail == (
        "24 E2E regions, at least 100.0% of their steps' kernels linked to launches" + said
    )
