"""SGLang's recording: its shapes, its layers by module range, and its decode layers by sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from opkit.align import sequence
from opkit.align.engine import engine_shapes
from opkit.align.files import read_manifest
from opkit.align.regions import CaseRegions, Launch, mark_layers, nvtx_regions, read_steps
from opkit.align.result import Method
from opkit.align.shapes import CaseSteps, case_steps, read_labels
from opkit.layers.op import Case, LaunchMode, Phase, RegionPattern
from opkit.layers.registry import find_op
from opkit.nsys_parsers.ranges import StepLabel
from opkit.nsys_parsers.trace import Trace, open_trace

# Where it comes from is told in tests/traces/README.md.
RECORDING = Path(__file__).parents[1] / "traces" / "dsa-sglang-h100-e2e.sqlite.gz"
PATTERN = find_op("dsa").region["sglang"]
LAYERS = 4
SPARSE = Case(Phase.CONTEXT, 1, 4096, 0)
DECODE = Case(Phase.GENERATION, 1, 1, -1)


@pytest.fixture(scope="module")
def recorded() -> Iterator[tuple[Trace, dict[Case, CaseSteps]]]:
    """The open recording and its steps by shape, layers marked."""
    with open_trace(RECORDING) as opened:
        cases, _ = case_steps(read_labels(opened), ())
        mark_layers(opened, PATTERN)
        yield opened, {case.case: case for case in cases}


@pytest.fixture(scope="module")
def learned(recorded: tuple[Trace, dict[Case, CaseSteps]]) -> sequence.Learned:
    """What the module ranges of all steps teach."""
    trace, cases = recorded
    steps = read_steps(trace, [step for case in cases.values() for step in case.steps])
    return sequence.learn(list(steps.values()))


def shorts(launches: tuple[Launch, ...]) -> list[str]:
    return [launch.name.short for launch in launches]


def test_labels_and_kernels_give_the_shapes() -> None:
    # Three steps of each label are left, so decode steps do not add up to the requests.
    found = [(c.case.phase, c.case.label(), mode) for c, mode in engine_shapes([RECORDING])[0]]
    context, generation = Phase.CONTEXT, Phase.GENERATION
    assert found == [
        (context, "1 × 16", LaunchMode.EAGER),
        (context, "1 × 512", LaunchMode.EAGER),
        (context, "1 × 4,096", LaunchMode.EAGER),
        (context, "4 × 1,024", LaunchMode.EAGER),
        (generation, "1 × 1 @ ?", LaunchMode.GRAPH),
        (generation, "4 × 1 @ ?", LaunchMode.GRAPH),
    ]


def test_its_labels_are_read(recorded: tuple[Trace, dict[Case, CaseSteps]]) -> None:
    labels = Counter(step.label for step in read_labels(recorded[0]))
    assert labels[StepLabel(4, 4096, 0, 0)] == 1
    assert labels[StepLabel(0, 0, 1, 1)] == 3


def test_its_manifest_tells_command_and_requests(
    recorded: tuple[Trace, dict[Case, CaseSteps]],
) -> None:
    manifest = read_manifest(recorded[0].facts)
    assert manifest is not None
    assert (manifest.backend, manifest.versions["sglang"]) == ("sglang", "0.5.14")
    assert "sglang.launch_server" in manifest.command
    assert [(w.requests, w.prompt, w.output) for w in manifest.waves] == [
        (1, 512, 64), (1, 4096, 64), (4, 1024, 64),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (Case(Phase.CONTEXT, 1, 512, 0), 19),  # up to index_topk tokens it attends densely
        (Case(Phase.CONTEXT, 4, 1024, 0), 20),
        (SPARSE, 35),
    ],
)
def test_context_regions_are_the_module_ranges_of_every_layer(
    recorded: tuple[Trace, dict[Case, CaseSteps]], case: Case, kernels: int
) -> None:
    trace, cases = recorded
    found = nvtx_regions(cases[case], read_steps(trace, cases[case].steps))
    assert found is not None
    assert found.method is Method.LAUNCH_NVTX
    assert [region.layer for region in found.regions] == list(range(LAYERS))
    assert {len(region.launches) for region in found.regions} == {kernels}
    assert len({region.signature for region in found.regions}) == 1
    assert (found.attributed, found.silent_steps) == (1.0, 0)


def test_a_sparse_context_region_runs_from_the_first_to_the_last_projection(
    recorded: tuple[Trace, dict[Case, CaseSteps]],
) -> None:
    trace, cases = recorded
    found = nvtx_regions(cases[SPARSE], read_steps(trace, cases[SPARSE].steps))
    assert found is not None
    names = shorts(found.regions[0].launches)
    indexer = ["sm90_fp8_mqa_logits", "topk_transform_prefill_kernel"]
    assert [name for name in names if name in indexer] == indexer
    assert names.index("topk_transform_prefill_kernel") < names.index("sparse_attn_fwd_kernel")
    assert names[-1].startswith("nvjet_sm90")
    assert not any("FusedAddRMSNorm" in name for name in names)


def test_the_residual_norms_are_learned_as_borders(learned: sequence.Learned) -> None:
    assert {stem.rpartition("::")[2] for stem in learned.borders} == {"FusedAddRMSNormKernel"}
    assert learned.layers == frozenset(range(LAYERS))


def decode_regions(
    recorded: tuple[Trace, dict[Case, CaseSteps]], learned: sequence.Learned
) -> CaseRegions:
    """Decode regions with a mock that launches what the second layer does."""
    trace, cases = recorded
    steps = read_steps(trace, cases[DECODE].steps)
    first = next(iter(steps.values())).launches
    norms = [n for n, name in enumerate(shorts(first)) if name == "FusedAddRMSNormKernel"]
    mock = first[norms[1] + 1 : norms[2]]
    found = sequence.sequence_regions(cases[DECODE], steps, mock, learned, PATTERN)
    assert found is not None
    return found


@pytest.mark.parametrize("taught", [True, False])
def test_decode_regions_are_found_by_sequence_in_all_layers_but_the_first(
    recorded: tuple[Trace, dict[Case, CaseSteps]], learned: sequence.Learned, taught: bool
) -> None:
    found = decode_regions(recorded, learned if taught else sequence.Learned())
    assert len(found.regions) == (LAYERS - 1) * len(found.steps.steps)
    assert {region.mode for region in found.regions} == {LaunchMode.GRAPH}
    assert len({region.signature for region in found.regions}) == 1
    names = shorts(found.regions[0].launches)
    assert len(names) == 29
    assert (names[0], names[-1]) == ("fused_a_gemm_kernel", "splitKreduce_kernel")
    order = ["sm90_fp8_paged_mqa_logits", "topk_transform_decode_kernel", "FlashAttnFwdSm90"]
    assert [name for name in names if name in order] == order


def test_two_streams_of_a_graph_do_not_mix_up_the_order_of_capture(
    recorded: tuple[Trace, dict[Case, CaseSteps]], learned: sequence.Learned
) -> None:
    found = decode_regions(recorded, learned)
    overlaps = [
        sum(b.start < a.end for a, b in zip(r.launches, r.launches[1:], strict=False))
        for r in found.regions
    ]
    assert min(overlaps) > 0  # the indexer's stream runs beside the other
    assert len({tuple(shorts(region.launches)) for region in found.regions}) == 1


def test_other_borders_find_nothing(
    recorded: tuple[Trace, dict[Case, CaseSteps]],
) -> None:
    trace, cases = recorded
    steps = read_steps(trace, cases[DECODE].steps)
    mock = next(iter(steps.values())).launches[:30]
    none = RegionPattern(PATTERN.module, (r"no_such_norm",))
    unknown = sequence.Learned()
    assert sequence.sequence_regions(cases[DECODE], steps, mock, unknown, none) is None
