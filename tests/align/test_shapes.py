"""Shapes that the engine ran, from its step labels and the requests that were sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gpu_export import Export

from opkit.align.shapes import CaseSteps, Step, case_steps, read_labels
from opkit.layers.manifest import Wave
from opkit.layers.op import Case, Phase
from opkit.nsys_parsers.ranges import StepLabel
from opkit.nsys_parsers.trace import open_trace

MIXED = "steps that mix both phases were left out"
UNEQUAL = "steps with prompts of unequal length were left out"
NO_COUNT = "context steps whose label gives no token count were left out"
AHEAD = "a decode step scheduled after the last token was left out"
NOT_ADDED_UP = "step labels do not add up to the requests sent; shapes are from labels alone"

# (context requests, context tokens, generation requests) of a step, in time order
Labels = list[tuple[int, int | None, int]]
Found = dict[str, tuple[tuple[int, ...], tuple[int, int]]]


def steps(labels: Labels) -> list[Step]:
    return [
        Step(number, 1_000 * number, StepLabel(requests, tokens, decoding, decoding))
        for number, (requests, tokens, decoding) in enumerate(labels)
    ]


def found(labels: Labels, *waves: Wave) -> tuple[Found, list[str]]:
    """Steps and range of cache lengths, by phase and label of the case."""
    cases, notes = case_steps(steps(labels), waves)
    return {f"{c.case.phase} {c.case.label()}": (c.steps, c.past_range) for c in cases}, notes


def test_a_wave_gives_its_prompt_and_the_growing_cache_of_its_decode() -> None:
    labels: Labels = [(1, 1024, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)]
    assert found(labels, Wave(1, 1024, 4)) == (
        {
            "context 1 × 1,024": ((0,), (0, 0)),
            "generation 1 × 1 @ 1,025": ((1, 2, 3), (1024, 1026)),
        },
        [],
    )


def test_every_rank_of_one_trace_labels_the_step_that_they_run_together() -> None:
    # Seen with vLLM, --tensor-parallel-size 2: both workers' labels, a few µs apart.
    each = steps([(1, 1024, 0), (0, 0, 1), (0, 0, 1)])
    both = [
        replace(step, id=2 * step.id + rank, start=step.start + rank, pid=rank << 24)
        for step in each
        for rank in (0, 1)
    ]
    cases, notes = case_steps(both, (Wave(1, 1024, 3),))
    assert notes == []
    assert [(c.case.label(), sorted(c.steps), c.past_range) for c in cases] == [
        ("1 × 1,024", [0, 1], (0, 0)),
        ("1 × 1 @ 1,025", [2, 3, 4, 5], (1024, 1025)),
    ]


def test_a_rank_whose_labels_do_not_add_up_leaves_no_shape_to_the_waves() -> None:
    each = [replace(step, pid=1) for step in steps([(1, 1024, 0), (0, 0, 1)])]
    other = [replace(step, pid=2) for step in steps([(1, 1024, 0)])]
    _, notes = case_steps(each + other, (Wave(1, 1024, 2),))
    assert notes == [NOT_ADDED_UP]


def test_one_output_token_needs_no_decode_step() -> None:
    labels: Labels = [(2, 256, 0), (1, 64, 0)]
    assert found(labels, Wave(2, 128, 1), Wave(1, 64, 1)) == (
        {"context 1 × 64": ((1,), (0, 0)), "context 2 × 128": ((0,), (0, 0))},
        [],
    )


def test_the_same_shape_in_two_waves_is_one_case() -> None:
    labels: Labels = [(1, 512, 0), (0, 0, 1), (1, 512, 0), (0, 0, 1)]
    assert found(labels, Wave(1, 512, 2), Wave(1, 512, 2)) == (
        {
            "context 1 × 512": ((0, 2), (0, 0)),
            "generation 1 × 1 @ 512": ((1, 3), (512, 512)),
        },
        [],
    )


def test_decode_of_two_waves_at_other_lengths_stays_apart() -> None:
    labels: Labels = [(1, 512, 0), (0, 0, 1), (1, 4096, 0), (0, 0, 1)]
    cases, _ = found(labels, Wave(1, 512, 2), Wave(1, 4096, 2))
    assert set(cases) == {
        "context 1 × 512", "context 1 × 4,096",
        "generation 1 × 1 @ 512", "generation 1 × 1 @ 4,096",
    }  # fmt: skip


def test_a_scheduler_may_split_a_wave() -> None:
    # 16 requests: 3 are scheduled at once, 13 beside the first decode of those.
    labels: Labels = [(3, 1536, 0), (13, 6656, 3), (0, 0, 16), (0, 0, 16), (0, 0, 13)]
    assert found(labels, Wave(16, 512, 4)) == (
        {
            "context 3 × 512": ((0,), (0, 0)),
            "generation 13 × 1 @ 514": ((4,), (514, 514)),
            "generation 16 × 1 @ 514": ((2, 3), (513, 514)),
        },
        [MIXED],
    )


def test_a_long_prompt_in_chunks_is_a_case_for_each_chunk() -> None:
    labels: Labels = [(1, 8192, 0), (1, 1808, 0), (0, 0, 1)]
    assert found(labels, Wave(1, 10_000, 2)) == (
        {
            "context 1 × 1,808 @ 8,192": ((1,), (8192, 8192)),
            "context 1 × 8,192": ((0,), (0, 0)),
            "generation 1 × 1 @ 10,000": ((2,), (10_000, 10_000)),
        },
        [],
    )


def test_a_budget_that_ends_inside_a_prompt_leaves_that_step_out() -> None:
    # 8,192 tokens a step: one prompt of 5,000 and 3,192 of the next, then the other 1,808.
    labels: Labels = [(2, 8192, 0), (1, 1808, 1), (0, 0, 2), (0, 0, 1)]
    assert found(labels, Wave(2, 5000, 3)) == (
        {
            "generation 1 × 1 @ 5,001": ((3,), (5001, 5001)),
            "generation 2 × 1 @ 5,001": ((2,), (5001, 5001)),
        },
        [MIXED, UNEQUAL],
    )


def test_steps_of_a_priming_request_are_set_aside() -> None:
    priming: Labels = [(1, 16, 0), (0, 0, 1)]
    wave: Labels = [(1, 1024, 0), (0, 0, 1)]
    for cut in (0, 1, 2):  # the window may cut its first steps
        cases, notes = found([*priming[cut:], *wave], Wave(1, 1024, 2))
        assert set(cases) == {"context 1 × 1,024", "generation 1 × 1 @ 1,024"}
        assert cases["context 1 × 1,024"][0] == (2 - cut,)
        assert notes == []


@pytest.mark.parametrize(
    "labels",
    [
        [(1, 1024, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1)],  # two steps too many
        [(1, 1024, 0)],  # a step too few
        [(1, 1000, 0), (0, 0, 1)],  # another prompt
        [(2, 2048, 0), (0, 0, 2)],  # another number of requests
        [(1, 1024, 0), (0, 0, 2)],  # a foreign request decodes beside
        [(1, None, 0), (0, 0, 1)],  # TensorRT-LLM before May 2026
    ],
)
def test_labels_that_do_not_add_up_are_read_alone_and_said(labels: Labels) -> None:
    cases, notes = found(labels, Wave(1, 1024, 2))
    assert NOT_ADDED_UP in notes
    assert all(past == (-1, -1) for name, (_, past) in cases.items() if "generation" in name)


def test_the_step_that_sglang_schedules_ahead_is_left_out_of_each_wave() -> None:
    # Its overlapped scheduler launches the next step before it knows that the requests ended.
    first: Labels = [(1, 512, 0), *[(0, 0, 1)] * 2]
    second: Labels = [(4, 2048, 0), *[(0, 0, 4)] * 2]
    labels = [*first, (0, 0, 1), *second, (0, 0, 4)]
    shapes, notes = found(labels, Wave(1, 512, 3), Wave(4, 512, 3))
    assert shapes == {
        "context 1 × 512": ((0,), (0, 0)),
        "context 4 × 512": ((4,), (0, 0)),
        "generation 1 × 1 @ 513": ((1, 2), (512, 513)),
        "generation 4 × 1 @ 513": ((5, 6), (512, 513)),
    }
    assert notes == [AHEAD]
    assert found([*first, *second], Wave(1, 512, 3), Wave(4, 512, 3))[1] == []


@pytest.mark.parametrize(
    "more",
    [
        (0, 0, 2),  # of another batch
        (1, 512, 1),  # beside a prompt
        (1, 512, 0),  # a prompt of its own
    ],
)
def test_only_a_repeated_decode_step_counts_as_scheduled_ahead(
    more: tuple[int, int | None, int],
) -> None:
    _, notes = found([(1, 512, 0), (0, 0, 1), more], Wave(1, 512, 2))
    assert NOT_ADDED_UP in notes
    assert AHEAD not in notes


def test_without_waves_labels_give_what_they_say() -> None:
    labels: Labels = [
        (1, 4096, 0), (4, 4096, 0), (2, 4095, 0), (2, 64, 3), (1, None, 0), (0, 0, 16), (0, 0, 16),
    ]  # fmt: skip
    assert found(labels) == (
        {
            "context 1 × 4,096": ((0,), (0, 0)),
            "context 4 × 1,024": ((1,), (0, 0)),
            "generation 16 × 1 @ ?": ((5, 6), (-1, -1)),
        },
        sorted([MIXED, UNEQUAL, NO_COUNT]),
    )


def test_no_steps_give_no_shapes() -> None:
    assert found([]) == ({}, [])
    assert found([], Wave(1, 16, 2)) == ({}, [NOT_ADDED_UP])


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["execute_context_1(4096)_generation_0(0)", "execute_context_0(0)_generation_4(4)"],
         [StepLabel(1, 4096, 0, 0), StepLabel(0, 0, 4, 4)]),
        (["[Executor] _forward_step 12: 1 ctx reqs, 4 gen reqs",
          "[Executor] _forward_step 13: 1 ctx reqs, 1024 ctx tokens, 4 gen reqs"],
         [StepLabel(1, None, 4, 4), StepLabel(1, 1024, 4, 4)]),
        # Idle turns of vLLM's loop are no steps; nor is anything else.
        (["execute_context_0(0)_generation_0(0)", "execute_model", "{'Module': 'model'}"], []),
    ],
)  # fmt: skip
def test_labels_are_read_in_time_order_with_their_kernels(
    texts: list[str], labels: list[StepLabel], tmp_path: Path
) -> None:
    made = Export()
    for number, text in reversed(list(enumerate(texts))):
        made.range(text, 1_000 * number, 1_000 * number + 500)
        made.launch(f"k{number}", 1_000 * number + 100, 9_000 + number)
    with open_trace(made.write(tmp_path / "made.sqlite")) as trace:
        read = read_labels(trace)
        placed = trace.rows(
            "SELECT k.name FROM step_of s JOIN kernel k ON k.id = s.kernel_id "
            "JOIN nvtx n ON n.id = s.range_id ORDER BY n.start"
        )
    assert [step.label for step in read] == labels
    assert [step.start for step in read] == [1_000 * number for number in range(len(labels))]
    if labels:
        assert placed == [("k0",), ("k1",)]


def test_a_case_carries_the_middle_of_its_cache_lengths() -> None:
    cases, _ = case_steps(steps([(1, 100, 0), *[(0, 0, 1)] * 5]), (Wave(1, 100, 6),))
    assert cases[1] == CaseSteps(
        Case(Phase.GENERATION, 1, 1, 102), (1, 2, 3, 4, 5), (100, 104), (3,)
    )


def test_warm_up_waves_before_the_recorded_ones_are_set_aside() -> None:
    # SGLang labels its steps from its start: --window process records its own request and warm-up.
    def wave(requests: int, tokens: int, output: int) -> Labels:
        return [(requests, requests * tokens, 0), *[(0, 0, requests)] * output]  # one step ahead

    waves = [*wave(1, 512, 40), *wave(4, 1024, 40)]
    labels: Labels = [*wave(1, 64, 8), *waves, *waves, *waves]
    first = len(labels) - len(waves)
    cases, notes = found(labels, Wave(1, 512, 40), Wave(4, 1024, 40))
    assert cases == {
        "context 1 × 512": ((first,), (0, 0)),
        "generation 1 × 1 @ 531": (tuple(range(first + 1, first + 40)), (512, 550)),
        "context 4 × 1,024": ((first + 41,), (0, 0)),
        "generation 4 × 1 @ 1,043": (tuple(range(first + 42, first + 81)), (1024, 1062)),
    }
    assert notes == [AHEAD]
