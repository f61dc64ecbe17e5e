"""What changed between two alignments: kernels, times, shapes, provenance; made and recorded."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from real_names import NAMES

from opkit.align.compare import (
    FLOOR_NS,
    KERNEL,
    _laid_beside,
    compare_alignments,
    pair_cases,
)
from opkit.align.comparison import (
    AlignComparison,
    Change,
    Fact,
    KernelChange,
    Pace,
    comparison_json,
)
from opkit.align.judge import Question, judge
from opkit.align.match import align_names
from opkit.align.result import (
    AlignResult,
    CaseMatch,
    KernelPair,
    KernelStat,
    Level,
    Method,
    Outcome,
    PhaseResult,
    SideSummary,
)
from opkit.align.result_json import align_from_json
from opkit.errors import WrongUsage
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.registry import find_op
from opkit.nsys_parsers.names import parse_name

TRACES = Path(__file__).parents[1] / "traces"
RECORDED = Path(__file__).parents[2] / "opkit" / "recorded"
GEMM, OTHER_TILE = "nvjet_sm90_tst_64x128_64x8_TNN", "nvjet_sm90_tst_128x256_64x4_TNN"
NORM, TOPK, WRITE = "rms_norm_kernel", "topKPerRowPrefill", "concat_and_cache_mla_kernel"
SHAPE = Case(Phase.CONTEXT, 1, 1024, 0)
Timed = tuple[str, float]


def stat(short: str, us: float, *, mad_us: float = 0.1, **more: Any) -> KernelStat:
    name = parse_name(NAMES.get(short, short))
    ns = round(us * 1000)
    made = KernelStat(name.demangled, name.short, name.family, (132, 1, 1), (256, 1, 1), 24, ns,
                      ns - 50, ns + 50, round(mad_us * 1000))  # fmt: skip
    return replace(made, **more)


def case(
    mock: Sequence[KernelStat],
    e2e: Sequence[KernelStat] | None = None,
    shape: Case = SHAPE,
    mode: LaunchMode = LaunchMode.EAGER,
) -> CaseMatch:
    """A case whose kernels are what is given; without ``e2e`` the same on both sides."""
    engine = mock if e2e is None else e2e
    sides = [
        SideSummary(shape, mode, 20, 0, len(ks), sum(k.median_ns for k in ks),
                    sum(k.median_ns for k in ks))
        for ks in (mock, engine)
    ]  # fmt: skip
    pairs = [KernelPair(k, None, Level.MOCK_ONLY, True, False, 0.1) for k in mock]
    pairs += [KernelPair(None, k, Level.E2E_ONLY, True, False, 0.1) for k in engine]
    return CaseMatch(sides[0], sides[1], Method.LAUNCH_NVTX, 1.0, 0.4, tuple(pairs))


def aligned(*cases: CaseMatch, op: str = "dsa", **known: Any) -> AlignResult:
    phases = tuple(
        PhaseResult(phase, Outcome.PASS, Method.LAUNCH_NVTX, 1.0, chosen, ())
        for phase in Phase
        if (chosen := tuple(c for c in cases if c.mock.case.phase is phase))
    )
    about = {"gpu": "NVIDIA H100 80GB HBM3", "versions": {"vllm": "0.24.0"}, **known}
    return AlignResult(op, "vllm", Outcome.PASS, phases, about)


BASE = (stat(GEMM, 30), stat(NORM, 2.4), stat(TOPK, 97), stat(WRITE, 3.1), stat(NORM, 2.5))


def engine_rows(after: Sequence[KernelStat], **given: Any) -> list[KernelChange]:
    """What is told of the engine's kernels when ``BASE`` becomes ``after``."""
    found = compare_alignments(aligned(case(BASE)), aligned(case(BASE, after)), **given)
    (changed,) = found.phases[0].cases
    assert not changed.mock.differs, "the mock did not change"
    assert found.differs == changed.differs == changed.e2e.differs
    return [row for row in changed.e2e.kernels if row.differs]


def without(position: int) -> list[KernelStat]:
    return [*BASE[:position], *BASE[position + 1 :]]


def with_kernel(position: int, kernel: KernelStat) -> list[KernelStat]:
    return [*BASE[:position], kernel, *BASE[position:]]


def in_place(position: int, **changed: Any) -> list[KernelStat]:
    after = list(BASE)
    after[position] = replace(after[position], **changed)
    return after


def renamed(position: int, short: str, us: float) -> list[KernelStat]:
    return [*BASE[:position], stat(short, us), *BASE[position + 1 :]]


@pytest.mark.parametrize(
    ("after", "change", "calls"),
    [
        (renamed(0, OTHER_TILE, 30), Change.VARIANT, (1, 1)),
        (without(2), Change.GONE, (1, 0)),
        (with_kernel(1, stat("splitKreduce_kernel", 2.0)), Change.NEW, (0, 1)),
        (with_kernel(5, stat(NORM, 2.4)), Change.MORE, (2, 3)),
        (without(4), Change.FEWER, (2, 1)),
    ],
    ids=["variant", "gone", "new", "more", "fewer"],
)
def test_a_changed_kernel_is_told_by_what_became_of_it(
    after: list[KernelStat], change: Change, calls: tuple[int, int]
) -> None:
    (row,) = engine_rows(after)
    assert (row.change, (row.calls_a, row.calls_b)) == (change, calls)
    assert (row.a is None, row.b is None) == (
        change in (Change.NEW, Change.MORE),
        change in (Change.GONE, Change.FEWER),
    )


def test_a_kernel_that_moved_is_neither_new_nor_gone() -> None:
    moved = [BASE[0], BASE[1], BASE[3], BASE[2], BASE[4]]
    rows = engine_rows(moved)
    assert {row.change for row in rows} == {Change.MOVED}
    assert len({row.a.short if row.a else row.b.short for row in rows if row.a or row.b}) == 1


def test_other_element_types_are_no_variant() -> None:
    name = "void ns::quantize<{}, 128>(float *)"
    before, after = (
        stat(GEMM, 9, name=name.format(dtype)) for dtype in ("__nv_bfloat16", "__nv_fp8_e4m3")
    )
    found = compare_alignments(aligned(case([before])), aligned(case([after])))
    (row,) = found.phases[0].cases[0].e2e.kernels
    assert row.change is Change.DTYPE


@pytest.mark.parametrize(
    ("us", "mad_us", "pace"),
    [
        (97 * (1 + KERNEL) + 0.1, 0.1, Pace.SLOWER),
        (97 * (1 + KERNEL) - 0.1, 0.1, Pace.STEADY),
        (97 * (1 - KERNEL) - 0.1, 0.1, Pace.FASTER),
        (121, 6.0, Pace.STEADY),  # 24 µs apart, 4 × (0.1 + 6.0) µs of spread
        (122, 6.0, Pace.SLOWER),
    ],
)
def test_a_time_has_changed_beyond_tolerance_and_spread(
    us: float, mad_us: float, pace: Pace
) -> None:
    rows = engine_rows(in_place(2, median_ns=round(us * 1000), mad_ns=round(mad_us * 1000)))
    paces = [row.pace for row in rows if row.change is Change.SAME]
    assert paces == ([] if pace is Pace.STEADY else [pace])


def test_half_a_microsecond_is_never_a_change() -> None:
    short = stat(NORM, 0.7, mad_us=0)
    for more, differs in ((FLOOR_NS, False), (FLOOR_NS + 1, True)):
        after = replace(short, median_ns=short.median_ns + more)
        found = compare_alignments(
            aligned(case([short, stat(TOPK, 97)])), aligned(case([after, stat(TOPK, 97)]))
        )
        assert found.differs is differs


def test_a_tighter_tolerance_finds_more() -> None:
    after = in_place(2, median_ns=round(97_000 * 1.05))
    assert engine_rows(after) == []
    (row,) = engine_rows(after, kernel=0.03)
    assert row.pace is Pace.SLOWER
    assert row.ratio == pytest.approx(1.05)
    # Both kernels spread by 0.1 µs: of 97 and of 101.85.
    assert row.ratio_spread == pytest.approx(1.05 * (1 / 970**2 + 1 / 1018.5**2) ** 0.5)


@pytest.mark.parametrize(("grid", "differs"), [((64, 1, 1), True), (None, False)])
def test_a_kernel_launched_otherwise_is_told(grid: object, differs: bool) -> None:
    rows = engine_rows(in_place(2, grid=grid))
    assert [row.launch for row in rows] == ([True] if differs else [])


def test_many_small_changes_in_one_direction_are_a_change_of_the_shape() -> None:
    slower = [replace(k, median_ns=round(k.median_ns * 1.09)) for k in BASE]
    found = compare_alignments(aligned(case(BASE)), aligned(case(BASE, slower)))
    (changed,) = found.phases[0].cases
    assert not any(row.differs for row in changed.e2e.kernels)
    assert (changed.e2e.pace, found.differs) == (Pace.SLOWER, True)
    assert changed.e2e.ratio == pytest.approx(1.09, abs=1e-3)


def test_equal_ends_take_no_search_and_change_no_match() -> None:
    """GIVEN equal beginnings and ends, THEN the sequences are laid as ``align_names`` lays them."""
    for after in (without(2), with_kernel(1, BASE[1]), renamed(0, OTHER_TILE, 3), list(BASE), []):
        names = [[parse_name(k.name) for k in side] for side in (BASE, after)]
        levels = [level for *_, level in _laid_beside(*names)]
        assert sorted(levels) == sorted(level for *_, level in align_names(*names))
        for side, sequence in enumerate(names):
            placed = [pairing[side] for pairing in _laid_beside(*names)]
            assert [n for n in placed if n is not None] == list(range(len(sequence)))


def test_each_change_is_grouped_once_over_all_shapes() -> None:
    long = replace(SHAPE, tokens=4096)
    after = renamed(0, OTHER_TILE, 30)
    found = compare_alignments(
        aligned(case(BASE), case(BASE, shape=long)),
        aligned(case(BASE, after), case(BASE, after, shape=long)),
    )
    (group,) = found.phases[0].grouped
    assert (group.side, group.change, group.places) == ("e2e", Change.VARIANT, 2)
    assert group.cases == ("1 × 1,024", "1 × 4,096")
    assert (group.name_a, group.name_b) == tuple(parse_name(NAMES.get(n, n)).short
                                                 for n in (GEMM, OTHER_TILE))  # fmt: skip


def test_shapes_are_paired_by_shape_then_by_what_is_nearly_cached() -> None:
    def decode(past: int, mode: LaunchMode = LaunchMode.GRAPH) -> CaseMatch:
        return case(BASE, shape=Case(Phase.GENERATION, 4, 1, past), mode=mode)

    a = [decode(1029), decode(517), decode(517, LaunchMode.EAGER), decode(64)]
    b = [decode(517, LaunchMode.EAGER), decode(1030), decode(517), decode(80)]
    pairs, only_a, only_b = pair_cases(a, b)
    assert [(a.index(left), b.index(right)) for left, right in pairs] == [(0, 1), (1, 2), (2, 0)]
    assert (only_a, only_b) == ([a[3]], [b[3]])


def test_a_shape_or_phase_of_one_side_only_is_a_difference() -> None:
    decode = case(BASE, shape=Case(Phase.GENERATION, 4, 1, 100))
    found = compare_alignments(aligned(case(BASE)), aligned(case(BASE), decode))
    assert found.differs
    assert [(p.verdict_a, p.verdict_b) for p in found.phases] == [
        (Outcome.PASS, Outcome.PASS),
        (None, Outcome.PASS),
    ]
    assert (found.phases[1].only_a, found.phases[1].only_b) == ((), ("4 × 1 @ 100",))


def test_provenance_is_told_value_by_value() -> None:
    before = aligned(
        case(BASE),
        model={"config_sha256": "a" * 64},
        layer_source={"vllm/mla.py": "1" * 64, "same.py": "3" * 64},
        commands={"e2e": ["vllm", "serve", "m", "--max-num-seqs", "64", "--enforce-eager"]},
        waves=[{"requests": 1, "prompt": 512, "output": 12}],
        policy={"latency": 0.1},
        created="2026-11-20",
    )
    after = aligned(
        case(BASE),
        versions={"vllm": "0.25.0", "gpu": "told elsewhere"},
        model={"config_sha256": "a" * 64, "told": "more of the same model"},
        layer_source={"vllm/mla.py": "2" * 64, "same.py": "3" * 64},
        commands={"e2e": ["vllm", "serve", "m", "--max-num-seqs", "128"]},
        waves=[{"requests": 1, "prompt": 512, "output": 96}],
        policy={"latency": 0.05},
        created="2026-11-21",
    )
    found = compare_alignments(before, after)
    assert found.facts == (
        Fact("versions", "vllm", "0.24.0", "0.25.0"),
        Fact("layer source", "vllm/mla.py", "1" * 64, "2" * 64),
        Fact("policy", "latency", "0.1", "0.05"),
        Fact("run", "flags", "--max-num-seqs 64 --enforce-eager", "--max-num-seqs 128"),
        Fact("run", "requests", "1x512+12", "1x512+96"),
    )
    assert found.warnings == ()
    assert not found.differs, "provenance alone is no difference of kernels or times"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"gpu": "NVIDIA B200"}, "different GPUs: NVIDIA H100 80GB HBM3 and NVIDIA B200"),
        ({"model": {"architecture": "Qwen3ForCausalLM"}}, "different models: unknown and Qwen3"),
        ({"tp_size": 8}, "different tensor parallel sizes: unknown and 8"),
        ({"dtypes": {"weights": "fp8"}}, "different dtypes: unknown and weights fp8"),
    ],
)
def test_other_machines_and_models_are_warned_of(changed: dict[str, Any], sentence: str) -> None:
    found = compare_alignments(aligned(case(BASE)), aligned(case(BASE), **changed))
    (warning,) = found.warnings
    assert warning.startswith(sentence)


def test_nothing_in_common_is_warned_of_and_no_pass() -> None:
    found = compare_alignments(
        aligned(case(BASE)), aligned(case(BASE, shape=replace(SHAPE, tokens=7)))
    )
    assert found.warnings == ("no shape was run by both, so no kernel is compared",)
    assert found.differs


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: aligned(case(BASE), op="mla"), "first is of dsa and second of mla"),
        (lambda: aligned(case(BASE)), "first and second are one alignment"),
    ],
)
def test_what_cannot_be_compared_is_wrong_usage(
    other: Callable[[], AlignResult], sentence: str
) -> None:
    with pytest.raises(WrongUsage, match=sentence):
        compare_alignments(aligned(case(BASE)), other(), ("first", "second"))


# Real recordings.


@cache
def judged(mock: Path, e2e: Path) -> AlignResult:
    return judge(Question(find_op("dsa"), mock, (e2e,)))


@cache
def bundled() -> AlignResult:
    return judged(*(RECORDED / f"dsa-vllm-h100-{side}.sqlite.gz" for side in ("mock", "e2e")))


@cache
def collected() -> AlignResult:
    """The alignment behind the recorded collection: the same build, model and kind of GPU, on
    another day; written by an opkit before results held offsets and samples."""
    with gzip.open(TRACES / "collected" / "dsa-h100-alignment.json.gz") as file:
        return align_from_json(json.load(file))


def wrong(fault: str) -> AlignResult:
    return judged(TRACES / "wrong" / f"{fault}.sqlite.gz", TRACES / "wrong-e2e.sqlite.gz")


def test_two_runs_of_one_build_launch_the_same_kernels_in_the_same_time() -> None:
    """GIVEN two real runs hours apart, THEN no kernel and no time differs at the default limits."""
    found = compare_alignments(bundled(), collected())
    context = found.phases[0]
    labels = ["1 × 512", "1 × 1,024", "1 × 4,096", "2 × 512", "4 × 1,024"]
    assert [case.label for case in context.cases] == labels
    assert not any(case.differs for case in context.cases)
    assert context.grouped == ()
    assert found.warnings == ()
    assert furthest(found) == pytest.approx(0.030, abs=0.001)


def test_two_ways_to_record_one_build_tell_the_same() -> None:
    """GIVEN the engine recorded from its start and in a window, THEN all nine shapes that both ran
    are alike: one decode step with a token more in the cache."""
    process = judged(*(TRACES / f"h100-process-{side}.sqlite.gz" for side in ("mock", "e2e")))
    found = compare_alignments(bundled(), process)
    cases = [case for phase in found.phases for case in phase.cases]
    assert len(cases) == 9
    assert not any(case.differs for case in cases)
    near = [(case.label, case.label_b) for case in cases if case.label != case.label_b]
    assert near == [("4 × 1 @ 1,029", "4 × 1 @ 1,030")]
    # What the limits were set by.
    assert furthest(found) == pytest.approx(0.052, abs=0.001)


def furthest(found: AlignComparison) -> float:
    """How far the worst ratio of a shape's GPU time lies from 1."""
    cases = [case for phase in found.phases for case in phase.cases]
    return max(abs((side.ratio or 0) - 1) for case in cases for side in case.sides)


def test_a_cache_that_is_no_longer_written_is_told_of_the_mock_alone() -> None:
    found = compare_alignments(wrong("zero_weights"), wrong("no_kv_write"))
    for phase in found.phases:
        gone = [group for group in phase.grouped if group.change is Change.GONE]
        assert [(group.side, group.name_a) for group in gone] == [("mock", WRITE)]
        assert not any(case.e2e.differs for case in phase.cases), "one recording of the engine"


def test_another_cache_type_is_told_as_another_kernel() -> None:
    found = compare_alignments(wrong("zero_weights"), wrong("fp8_kv"))
    names = {(g.change, g.name_a or g.name_b) for p in found.phases for g in p.grouped}
    assert (Change.GONE, WRITE) in names
    assert (Change.NEW, "concat_and_cache_ds_mla_kernel") in names


def test_eager_instead_of_a_graph_is_a_difference() -> None:
    found = compare_alignments(wrong("zero_weights"), wrong("eager"))
    generation = found.phases[1]
    assert {case.mock.mode_differs for case in generation.cases} == {True}


def test_the_comparison_is_json_with_a_versioned_schema() -> None:
    found = compare_alignments(wrong("zero_weights"), wrong("no_kv_write"), ("a", "b"))
    data = json.loads(json.dumps(comparison_json(found)))
    assert (data["schema"], data["kind"], data["differs"]) == ("opkit.compare/1", "align", True)
    assert (data["a"]["name"], data["b"]["verdict"]) == ("a", "fail")
    first = data["phases"]["context"]["cases"][0]
    changes = [row["change"] for row in first["mock"]["kernels"]]
    assert changes.count("gone") == 1
    assert {row["change"] for row in first["e2e"]["kernels"]} == {"same"}
    assert first["e2e"]["ratio"] == 1.0
    assert first["e2e"]["ratio_spread"] >= 0
