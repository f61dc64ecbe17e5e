"""Each check passes on a phase that agrees, and fails for its own reason, with numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_subject import (
    CASE,
    OPERAND,
    PAIRS,
    alone,
    case_match,
    changed,
    checked,
    glue,
    not_passed,
    same,
    stat,
    subject,
    with_pair,
)

from opkit.align import causes
from opkit.align.policy import Policy
from opkit.align.result import KernelPair, Level
from opkit.layers.moe import MOE
from opkit.layers.op import Case, LaunchMode, Phase

ALL = ["evidence", "launch", "names", "counts", "missing/extra", "latency", "data"]
GRID = (64, 1, 1)


def test_a_phase_that_agrees_passes_every_check() -> None:
    results = checked(subject())
    assert list(results) == ALL
    assert {name: str(c.outcome) for name, c in results.items()} == dict.fromkeys(ALL, "pass")
    assert results["names"].detail == "6 key kernels: 6 same"
    assert "12 E2E regions, at least 100.0%" in results["evidence"].detail
    assert all(c.cause == c.next_step == "" and c.kernels == () for c in results.values())


def test_nothing_compared_is_inconclusive_in_one_sentence() -> None:
    empty = replace(subject(), cases=())
    assert not_passed(empty) == {"evidence": "inconclusive"}
    assert checked(empty)["evidence"].detail == "no case was found on both sides"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (subject(case_match(attributed=0.949)), "94.9% of the step's kernels are linked"),
        (subject(case_match(mock={"regions": 2})), "2 mock region(s), 3 needed"),
        (subject(case_match(e2e={"regions": 0})), "0 E2E region(s), 3 needed"),
        (subject(case_match(e2e={"odd_regions": 1})), "1 of 12 E2E regions launch another"),
        (subject(case_match(mock={"odd_regions": 3})), "3 of 12 mock regions launch another"),
        (subject(losses=("E2E: nsys says '5 records dropped'",)), "5 records dropped"),
    ],
)
def test_too_little_evidence_is_inconclusive(made: object, said: str) -> None:
    assert not_passed(made) == {"evidence": "inconclusive"}  # type: ignore[arg-type]
    result = checked(made)["evidence"]  # type: ignore[arg-type]
    assert said in result.detail
    assert "record again" in result.next_step


def test_regions_set_aside_are_said_and_do_not_stop() -> None:
    result = checked(subject(case_match(e2e={"misreported": 2})))["evidence"]
    assert result.outcome == "pass"
    assert "2 regions set aside" in result.detail


def test_a_key_kernel_of_another_name_fails_by_name() -> None:
    pairs = (*PAIRS, alone("topk_a", 9.0, Level.MOCK_ONLY), alone("topk_b", 9.0, Level.E2E_ONLY))
    made = subject(case_match(pairs))
    assert set(not_passed(made)) == {"names", "counts", "missing/extra"}
    result = checked(made)["names"]
    assert result.kernels == ("topk_a", "topk_b")
    assert "topk_a: mock only (at 1 × 4,096)" in result.detail


def test_other_element_types_are_never_good_enough() -> None:
    mock = replace(stat("norm", 3.0), name="norm<float>")
    pair = KernelPair(mock, stat("norm", 3.0), Level.DTYPE, True, False, 0.003)
    made = subject(case_match(changed(1, pair)))
    assert not_passed(made) == {"names": "fail"}
    result = checked(made)["names"]
    assert "other element types, mock norm<float>, E2E void ns::norm(float *)" in result.detail
    assert result.cause == causes.OTHER_DTYPE.cause
    assert result.next_step == causes.OTHER_DTYPE.next_step


@pytest.mark.parametrize("level", [Level.VARIANT, Level.ROLE])
def test_variants_and_declared_roles_pass_whatever_their_grid(level: Level) -> None:
    pair = replace(PAIRS[0], level=level, mock=stat("nvjet_other_tile", 101.0, grid=GRID))
    assert not_passed(subject(case_match(changed(0, pair)))) == {}


def test_two_variants_in_each_others_place_fail_by_order() -> None:
    first, last = stat("nvjet_a", 100.0), stat("nvjet_b", 101.0)
    pairs = (
        KernelPair(last, first, Level.VARIANT, True, False, 0.1),
        *PAIRS[1:6],
        KernelPair(first, last, Level.VARIANT, True, False, 0.1),
    )
    made = subject(case_match(pairs))
    assert not_passed(made) == {"missing/extra": "fail"}
    result = checked(made)["missing/extra"]
    assert result.kernels == ("nvjet_a", "nvjet_b")
    assert "another order: nvjet_a, nvjet_b" in result.detail
    assert result.cause == causes.OTHER_ORDER.cause


def test_other_tiles_at_several_places_are_no_other_order() -> None:
    tiles = [stat(f"nvjet_{tile}", 100.0) for tile in "abc"]
    pairs = (
        KernelPair(tiles[1], tiles[0], Level.VARIANT, True, False, 0.1),
        *PAIRS[1:6],
        KernelPair(tiles[2], tiles[1], Level.VARIANT, True, False, 0.1),
    )
    assert not_passed(subject(case_match(pairs))) == {}


def test_a_key_kernel_twice_fails_by_count() -> None:
    made = subject(case_match(with_pair(alone("rms_norm_kernel", 3.0, Level.MOCK_ONLY))))
    assert set(not_passed(made)) == {"names", "counts", "missing/extra"}
    result = checked(made)["counts"]
    assert "rms_norm_kernel 2× in the mock, 1× in E2E" in result.detail
    assert result.kernels == ("rms_norm_kernel",)


def test_too_many_launches_fail_even_when_all_are_glue() -> None:
    policy = Policy(glue_share=1.0)
    extra = glue(alone("copy_kernel", 0.5, Level.MOCK_ONLY))
    result = checked(subject(case_match(with_pair(extra)), policy=policy))["counts"]
    assert (str(result.outcome), result.kernels) == ("fail", ())
    assert "8 launches per forward in the mock, 7 in E2E" in result.detail
    lax = Policy(glue_share=1.0, launches=0.2)
    assert not_passed(subject(case_match(with_pair(extra)), policy=lax)) == {}


@pytest.mark.parametrize(
    ("level", "said"),
    [(Level.MOCK_ONLY, "extra in the mock"), (Level.E2E_ONLY, "missing in the mock")],
)
def test_a_key_kernel_on_one_side_is_named_with_its_time(level: Level, said: str) -> None:
    made = subject(case_match(with_pair(alone("quant_kernel", 4.2, level))))
    result = checked(made)["missing/extra"]
    assert str(result.outcome) == "fail"
    assert result.detail == f"{said}: quant_kernel (1 × 4,096 4.2 µs, 0.4%)"
    assert result.cause == causes.SPLIT_FUSED.cause


@pytest.mark.parametrize(
    ("share", "allowed", "outcome"),
    [(0.004, 0.0, "fail"), (0.004, 0.02, "pass"), (0.011, 0.02, "fail")],
)
def test_glue_on_one_side_may_take_the_policys_share_in_all(
    share: float, allowed: float, outcome: str
) -> None:
    first, second = (
        glue(alone(name, 2.0, Level.MOCK_ONLY, share=share)) for name in ("cast_a", "cast_b")
    )
    policy = Policy(glue_share=allowed, launches=0.5)
    result = checked(subject(case_match((*PAIRS, first, second)), policy=policy))["missing/extra"]
    assert str(result.outcome) == outcome
    if outcome == "pass":
        assert result.detail == "2 glue kernels on one side only"
    else:
        assert result.kernels == ("cast_a", "cast_b")
        assert result.cause == causes.EXTRA_GLUE.cause


def test_a_moved_kernel_fails_even_as_glue() -> None:
    moved = (
        glue(alone("copy_x", 1.0, Level.MOCK_ONLY)),
        *PAIRS,
        glue(alone("copy_x", 1.0, Level.E2E_ONLY)),
    )
    made = subject(case_match(moved), policy=Policy(glue_share=1.0))
    assert not_passed(made) == {"missing/extra": "fail"}
    assert checked(made)["missing/extra"].cause == causes.OTHER_ORDER.cause


def test_gpu_time_off_by_more_than_the_tolerance_fails() -> None:
    made = subject(case_match(mock={"gpu_ns": 1_108_000}, e2e={"gpu_ns": 1_000_000}))
    assert not_passed(made) == {"latency": "fail"}
    result = checked(made)["latency"]
    assert "1108.0 µs in the mock, 1000.0 µs in E2E (1.108×)" in result.detail
    assert result.cause == causes.SLOW_SIDE.cause
    close = subject(case_match(mock={"gpu_ns": 1_092_000}, e2e={"gpu_ns": 1_000_000}))
    assert not_passed(close) == {}


@pytest.mark.parametrize("gpu_ns", [2_000_001, 499_999])
def test_no_policy_lifts_the_hard_ceiling(gpu_ns: int) -> None:
    made = subject(
        case_match(mock={"gpu_ns": gpu_ns}, e2e={"gpu_ns": 1_000_000}), policy=Policy(latency=9.0)
    )
    assert not_passed(made) == {"latency": "fail"}


@pytest.mark.parametrize(
    ("us", "mock_us", "mad_us", "fails"),
    [
        (100.0, 114.0, 0.05, False),  # within 15 %
        (100.0, 116.0, 0.05, True),
        (100.0, 84.0, 0.05, True),
        (3.0, 4.4, 0.05, False),  # below what cache state does
        (3.0, 4.6, 0.05, True),
        (100.0, 138.0, 5.0, False),  # within 4 × (5 + 5) µs of its own spread
        (100.0, 141.0, 5.0, True),
        (100.0, 201.0, 20.0, True),  # twice is too much whatever the spread
        (0.7, 2.1, 0.01, True),
        (0.5, 1.4, 0.01, False),  # short kernels differ by a µs
    ],
)
def test_a_key_kernel_may_differ_by_what_its_spread_allows(
    us: float, mock_us: float, mad_us: float, fails: bool
) -> None:
    pair = replace(
        same("topKPerRowPrefill", us, other_us=mock_us),
        mock=stat("topKPerRowPrefill", mock_us, mad_us=mad_us),
        e2e=stat("topKPerRowPrefill", us, mad_us=mad_us),
    )
    made = subject(case_match(changed(4, pair), mock={"gpu_ns": 1}, e2e={"gpu_ns": 1}))
    assert ("latency" in not_passed(made)) is fails
    if fails:
        assert checked(made)["latency"].kernels == ("topKPerRowPrefill",)


@pytest.mark.parametrize(
    ("us", "mock_us", "fails"),
    [(0.7, 2.1, True), (2.0, 3.9, False), (2.0, 4.1, True), (4.1, 2.0, True), (0.5, 1.4, False)],
)
def test_glue_may_not_take_many_times_as_long(us: float, mock_us: float, fails: bool) -> None:
    made = subject(case_match(changed(2, glue(same("copy_kernel", us, other_us=mock_us)))))
    assert not_passed(made) == ({"latency": "fail"} if fails else {})


def test_another_launch_mode_fails_with_its_cause() -> None:
    made = subject(case_match(e2e={"mode": LaunchMode.GRAPH}))
    assert not_passed(made) == {"launch": "fail"}
    result = checked(made)["launch"]
    assert result.detail == "1 × 4,096: mock eager, E2E graph"
    assert result.cause == causes.EAGER_NOT_GRAPH.cause


@pytest.mark.parametrize("field", ["grid", "block"])
def test_another_grid_or_block_of_an_equal_kernel_fails(field: str) -> None:
    pair = replace(PAIRS[5], mock=stat("sparse_attn_fwd_kernel", 600.0, **{field: GRID}))
    made = subject(case_match(changed(5, pair)))
    assert not_passed(made) == {"launch": "fail"}
    result = checked(made)["launch"]
    assert result.kernels == ("sparse_attn_fwd_kernel",)
    assert "(64, 1, 1)" in result.detail
    assert "(132, 1, 1)" in result.detail
    assert result.cause == causes.OTHER_GRIDS.cause


def test_an_unknown_cache_length_is_no_evidence() -> None:
    made = subject(case_match(mock={"case": decode(16, 1029)}, e2e={"case": decode(16, -1)}))
    assert not_passed(made) == {"evidence": "inconclusive"}
    assert "16 × 1 @ ?" in checked(made)["evidence"].detail


def test_at_an_unknown_cache_length_another_time_fails_nothing() -> None:
    # gqa's recorded decode steps without their requests: another length, and so another time.
    slower = changed(4, replace(same("topKPerRowPrefill", 90.0, other_us=60.0)))
    known = case_match(slower, mock={"case": decode(16, 1029)}, e2e={"case": decode(16, 1029)})
    assert not_passed(subject(known)) == {"latency": "fail", "data": "fail"}
    unknown = subject(case_match(slower, e2e={"case": decode(16, -1)}))
    assert set(not_passed(unknown).values()) == {"inconclusive"}
    assert checked(unknown)["latency"].cause == causes.UNKNOWN_LENGTH.cause
    # What does not follow from the length fails as ever.
    other = subject(
        case_match((*slower, alone("k", 4.0, Level.MOCK_ONLY)), e2e={"case": decode(16, -1)})
    )
    assert not_passed(other)["missing/extra"] == "fail"


def test_latency_is_led_back_to_what_another_check_found() -> None:
    # Its own advice (clocks, an idle GPU) came first in the report, and misled.
    zeros = subject(case_match(changed(4, same("topKPerRowPrefill", 90.0, other_us=60.0))))
    zeros = replace(zeros, operands=(replace(OPERAND, zeros=1.0, distinct=0.0),))
    assert checked(zeros)["latency"].cause == causes.DEGENERATE.cause
    missing = subject(
        case_match((*PAIRS, alone("topk_write", 90.0, Level.E2E_ONLY)), mock={"gpu_ns": 800_000})
    )
    assert not_passed(missing)["latency"] == "fail"
    assert checked(missing)["latency"].cause == causes.FOLLOWS_KERNELS.cause


def decode(batch: int, past: int) -> Case:
    return Case(Phase.GENERATION, batch, 1, past)


@pytest.mark.parametrize(
    ("mock", "e2e", "fails"),
    [
        (Case(Phase.CONTEXT, 1, 2048, 0), CASE, True),
        (Case(Phase.CONTEXT, 2, 4096, 0), CASE, True),
        (decode(16, 1029), decode(16, 1035), False),  # the cache grows during the window
        (decode(16, 1029), decode(16, 1060), True),
        (decode(16, 4096), decode(16, 4150), False),  # within 2 %
        (decode(8, 1029), decode(16, 1029), True),
        (Case(Phase.CONTEXT, 1, 512, 0), Case(Phase.CONTEXT, 1, 512, 4096), True),
    ],
)
def test_another_shape_fails(mock: Case, e2e: Case, fails: bool) -> None:
    made = subject(case_match(mock={"case": mock}, e2e={"case": e2e}))
    assert not_passed(made) == ({"launch": "fail"} if fails else {})
    if fails:
        assert f"mock ran {mock.label()}" in checked(made)["launch"].detail


def test_without_a_record_of_operands_the_data_are_inconclusive() -> None:
    made = subject(operands=None)
    assert not_passed(made) == {"data": "inconclusive"}
    assert "require_operands" in checked(made)["data"].next_step
    assert not_passed(subject(operands=None, policy=Policy(require_operands=False))) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"zeros": 0.51}, "51% zeros"),
        ({"equal_rows": 1.0}, "100% of the sampled rows are equal"),
        ({"distinct": 0.0001}, "0.01% distinct values"),
    ],
)
def test_degenerate_operands_fail(change: dict[str, float], said: str) -> None:
    made = subject(operands=(OPERAND, replace(OPERAND, name="o_proj.input", **change)))
    assert not_passed(made) == {"data": "fail"}
    result = checked(made)["data"]
    assert result.detail == f"o_proj.input [7168, 16384] bfloat16: {said}"
    assert result.cause == causes.DEGENERATE.cause


def test_all_heavy_kernels_that_scale_alike_are_named_operand_data() -> None:
    pairs = tuple(
        same(p.name, p.e2e.median_ns / 1000, other_us=p.e2e.median_ns / 1000 * 0.92)
        if p.share >= 0.05 and p.e2e
        else p
        for p in PAIRS
    )
    made = subject(case_match(pairs))
    assert not_passed(made) == {"data": "fail"}
    result = checked(made)["data"]
    assert "all 4 heavy kernels take 0.92× E2E's time" in result.detail
    assert result.cause == causes.OPERAND_DATA.cause


def test_one_equal_kernel_of_another_time_is_named_data_dependent() -> None:
    pair = replace(same("topKPerRowPrefill", 90.0, other_us=60.0))
    made = subject(case_match(changed(4, pair)))
    assert not_passed(made) == {"latency": "fail", "data": "fail"}
    result = checked(made)["data"]
    assert result.kernels == ("topKPerRowPrefill",)
    assert "mock 60.0 µs, E2E 90.0 µs (0.67×)" in result.detail
    assert result.cause == causes.DATA_DEPENDENT.cause


def test_experts_of_another_time_are_led_back_to_the_routing() -> None:
    pair = same("fused_moe_kernel", 386.8, other_us=459.5)
    made = replace(subject(case_match(changed(4, pair))), op=MOE)
    assert checked(made)["data"].cause == causes.ROUTING.cause
    assert "--inputs captured" in (checked(made)["data"].next_step or "")
    captured = replace(made, inputs="captured")  # the router's own choices: not the reason
    assert checked(captured)["data"].cause == causes.DATA_DEPENDENT.cause


@pytest.mark.parametrize(
    ("us", "other_us", "mad_us", "fails"),
    [
        (1.2, 2.8, 0.05, True),  # steady, and another
        (1.2, 2.8, 0.9, False),  # either of two times, ten runs each: SGLang's on an H100
        (12.0, 28.0, 9.0, True),  # no kernel of that length may, whatever its spread
    ],
)
def test_a_tiny_kernel_of_two_times_is_no_odd_one(
    us: float, other_us: float, mad_us: float, fails: bool
) -> None:
    pair = same("prepare_varlen_num_blocks_kernel", us, other_us=other_us)
    assert pair.mock is not None
    pair = glue(replace(pair, mock=replace(pair.mock, mad_ns=round(mad_us * 1000))))
    made = subject(case_match((*PAIRS, pair)))
    assert ("prepare_varlen_num_blocks_kernel" in checked(made)["latency"].kernels) is fails


def test_strict_holds_the_mock_to_one_percent() -> None:
    assert "strict" not in checked(subject())
    assert not_passed(subject(strict={"1 × 4,096": 1.009})) == {}
    assert not_passed(subject(strict={})) == {"strict": "inconclusive"}
    failed = subject(strict={"1 × 4,096": 1.011, "4 × 1,024": float("inf")})
    assert not_passed(failed) == {"strict": "fail"}
    assert "1 × 4,096: decoder layer's module takes 1.0110×" in checked(failed)["strict"].detail


def test_many_problems_are_counted_and_all_kernels_kept() -> None:
    extra = tuple(alone(f"k{i}", 4.0, Level.MOCK_ONLY) for i in range(7))
    result = checked(subject(case_match((*PAIRS, *extra))))["missing/extra"]
    assert result.detail.endswith("; and 3 more")
    assert len(result.kernels) == 7


@pytest.mark.parametrize(
    ("pairs", "advice"),
    [
        ((alone("topKPerRowPrefill", 9, Level.E2E_ONLY),), causes.NO_INDEXER),
        ((alone("concat", 3, Level.E2E_ONLY, family="kv cache"),), causes.NO_KV_CACHE),
        ((alone("concat_a", 3, Level.E2E_ONLY, family="kv cache"),
          alone("concat_b", 3, Level.MOCK_ONLY, family="kv cache")), causes.OTHER_KV_LAYOUT),
        ((alone("ncclDevKernel", 9, Level.E2E_ONLY, family="nccl"),), causes.COMMUNICATION),
        ((glue(alone("cast", 2, Level.MOCK_ONLY)),), causes.EXTRA_GLUE),
        ((glue(alone("cast", 2, Level.E2E_ONLY)),), causes.MISSING_GLUE),
        ((alone("fused", 9, Level.E2E_ONLY), alone("a", 5, Level.MOCK_ONLY),
          alone("b", 5, Level.MOCK_ONLY)), causes.SPLIT_FUSED),
        ((alone("gemm_a", 9, Level.E2E_ONLY), alone("gemm_b", 9, Level.MOCK_ONLY)),
         causes.OTHER_KERNEL),
    ],
)  # fmt: skip
def test_the_likely_cause_follows_from_what_is_missing(
    pairs: tuple[KernelPair, ...], advice: causes.Advice
) -> None:
    assert causes.advise_names(pairs) == advice
