"""Regions by sequence: borders learned or declared, and never shrunk to fit a wrong mock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from made_pair import CONTEXT, GENERATION, LAYERS, engine, mock
from real_names import NAMES

from opkit.align.judge import Question, judge
from opkit.align.regions import CaseRegions, Launch, StepKernels, mark_layers, read_steps
from opkit.align.result import Method, Outcome
from opkit.align.sequence import Learned, learn, sequence_regions
from opkit.align.shapes import CaseSteps, case_steps, read_labels
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, Phase, RegionPattern
from opkit.nsys_parsers.names import parse_name
from opkit.nsys_parsers.trace import open_trace

VLLM = DSA.region["vllm"]
CASE = Case(Phase.GENERATION, 4, 1, 514)
FUSED, PLAIN = "fused_add_rms_norm_kernel", "rms_norm_kernel"
ATTENTION = [short for short, _ in GENERATION]
MLP = ["nvjet_sm90_tst_256x160_64x4", "act_and_mul_kernel"]
STEP = [
    "[memcpy DtoD]",
    *(x for layer in range(LAYERS) for x in (FUSED if layer else PLAIN, *ATTENTION, FUSED, *MLP)),
    FUSED,
    "nvjet_sm90_tst_384x8_64x4_TNT",
]


def launches(shorts: Sequence[str]) -> tuple[Launch, ...]:
    names = [parse_name(NAMES.get(short, short)) for short in shorts]
    return tuple(Launch(name, 10 * i, 10 * i + 8, (1, 1, 1), (1, 1, 1), True)
                 for i, name in enumerate(names))  # fmt: skip


def found(
    mock_kernels: Sequence[str],
    step: Sequence[str] = STEP,
    learned: Learned | None = None,
    pattern: RegionPattern = VLLM,
    steps: int = 3,
) -> CaseRegions | None:
    """Regions of the mock's sequence in steps that all launch the same kernels."""
    made = {i: StepKernels(i, launches(step), (None,) * len(step), False, 0) for i in range(steps)}
    case = CaseSteps(CASE, tuple(made), (514, 514))
    return sequence_regions(case, made, launches(mock_kernels), learned or Learned(), pattern)


def spans(regions: CaseRegions | None) -> list[list[str]]:
    """The distinct sequences found, in the order of the first."""
    assert regions is not None
    seen = {tuple(x.name.short for x in r.launches): None for r in regions.regions}
    return [list(sequence) for sequence in seen]


def eager_step() -> StepKernels:
    """A prompt's step with its layers known, as module ranges tell them."""
    kernels = [short for short, _ in CONTEXT]
    shorts: list[str] = []
    layers: list[int | None] = []
    for layer in range(LAYERS):
        shorts += [FUSED if layer else PLAIN, *kernels, FUSED, *MLP]
        layers += [None, *[layer] * len(kernels), None, None, None]
    return StepKernels(0, launches([*shorts, FUSED]), (*layers, None), False, 0)


def test_borders_are_what_stands_beside_the_op_and_never_inside() -> None:
    learned = learn([eager_step()])
    # The plain norm stands before the first layer, but also inside the op.
    assert learned.borders == {"vllm::fused_add_rms_norm_kernel"}
    assert "vllm::rms_norm_kernel" in learned.inside
    assert learned.layers == {0, 1, 2, 3}
    assert [len(example) for example in learned.examples] == [len(CONTEXT)]


def test_nothing_is_learned_from_steps_without_layers() -> None:
    assert learn([StepKernels(0, launches(STEP), (None,) * len(STEP), False, 0)]) == Learned()
    assert learn([]) == Learned()


@pytest.mark.parametrize("learned", [None, learn([eager_step()])], ids=["declared", "learned"])
def test_every_layer_but_the_first_is_found(learned: Learned | None) -> None:
    regions = found(ATTENTION, learned=learned)
    assert spans(regions) == [ATTENTION]
    assert regions is not None
    assert len(regions.regions) == 3 * (LAYERS - 1)
    assert (regions.method, regions.silent_steps) == (Method.SEQUENCE, 0)
    share = (LAYERS - 1) * len(ATTENTION) / len(STEP)
    assert regions.explained == pytest.approx(share)


@pytest.mark.parametrize(
    "wrong",
    [
        ATTENTION[1:],
        ATTENTION[:-1],
        ATTENTION[2:-2],
        [*ATTENTION[:6], *ATTENTION[9:]],  # no indexer
        ["[memset]", *ATTENTION],
        [*ATTENTION, "act_and_mul_kernel"],
    ],
    ids=["first", "last", "both ends", "indexer", "one before", "one after"],
)
@pytest.mark.parametrize("learned", [None, learn([eager_step()])], ids=["declared", "learned"])
def test_a_wrong_mock_still_gets_the_whole_region(
    wrong: list[str], learned: Learned | None
) -> None:
    assert spans(found(wrong, learned=learned)) == [ATTENTION]


def test_an_unrelated_mock_finds_nothing() -> None:
    assert found(["fused_moe_kernel", "moe_align_block_size_small_batch_expert_kernel"]) is None
    # Where module ranges have shown the op, it is found again whatever the mock is.
    learned = learn([eager_step()])
    assert spans(found(["indexSelectSmallIndex"] * 12, learned=learned)) == [ATTENTION]


def test_without_a_border_nothing_is_found() -> None:
    assert found(ATTENTION, pattern=RegionPattern(VLLM.module)) is None
    assert found(ATTENTION, step=[*ATTENTION, *MLP]) is None


def test_the_mlp_is_never_the_op() -> None:
    assert MLP not in spans(found(ATTENTION))
    assert MLP not in spans(found(ATTENTION, learned=learn([eager_step()])))


def test_steps_of_another_sequence_are_silent() -> None:
    made = {0: launches(STEP), 1: launches(MLP)}
    steps = {i: StepKernels(i, x, (None,) * len(x), False, 0) for i, x in made.items()}
    case = CaseSteps(CASE, (0, 1, 2), (514, 514))
    regions = sequence_regions(case, steps, launches(ATTENTION), Learned(), VLLM)
    assert regions is not None
    assert (len(regions.regions), regions.silent_steps) == (LAYERS - 1, 2)


def signatures(path: Path, method: Method | None, mock_path: Path) -> dict[str, tuple[str, int]]:
    """For each generation case: the kernels of its table and the GPU time, by one method."""
    result = judge(Question(DSA, mock_path, (path,), phases=(Phase.GENERATION,), method=method))
    assert result.verdict is Outcome.PASS
    return {
        case.e2e.case.label(): (
            " ".join(pair.e2e.name for pair in case.pairs if pair.e2e),
            case.e2e.gpu_ns,
        )
        for case in result.phases[0].cases
    }


def test_where_module_ranges_and_sequence_both_apply_they_agree(tmp_path: Path) -> None:
    e2e = engine(from_start=True).write(tmp_path / "e2e.sqlite")
    mock_path = mock().write(tmp_path / "mock.sqlite")
    by_range = signatures(e2e, None, mock_path)
    by_sequence = signatures(e2e, Method.SEQUENCE, mock_path)
    assert list(by_range) == ["1 × 1 @ 1,026", "4 × 1 @ 514"]
    for label, (kernels, gpu_ns) in by_range.items():
        assert by_sequence[label][0] == kernels
        assert by_sequence[label][1] == pytest.approx(gpu_ns, rel=0.01)  # less the first layer


def test_the_regions_of_both_ways_are_the_same_kernels(tmp_path: Path) -> None:
    with open_trace(engine(from_start=True).write(tmp_path / "e2e.sqlite")) as trace:
        cases, _ = case_steps(read_labels(trace), ())
        mark_layers(trace, VLLM)
        decode = next(c for c in cases if c.case.phase is Phase.GENERATION and c.case.batch == 4)
        steps = read_steps(trace, [step for case in cases for step in case.steps])
    by_range = [
        tuple(x for x, layer in zip(steps[i].launches, steps[i].layers, strict=True) if layer == at)
        for i in decode.steps
        for at in range(1, LAYERS)
    ]
    learned = learn(list(steps.values()))
    by_sequence = sequence_regions(decode, steps, by_range[0], learned, VLLM)
    assert by_sequence is not None
    assert [region.launches for region in by_sequence.regions] == by_range
