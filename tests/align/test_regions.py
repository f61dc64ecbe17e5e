"""Regions of the op: iterations of a mock, module ranges of an engine, and odd ones among them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gpu_export import Export, module
from made_export import TID
from made_pair import CASES, CONTEXT, GENERATION, engine, mock

from opkit.align.regions import (
    CaseRegions,
    Launch,
    Region,
    Times,
    mark_layers,
    mock_regions,
    nvtx_regions,
    read_steps,
    silent_iterations,
)
from opkit.align.result import Method
from opkit.align.shapes import CaseSteps, case_steps, read_labels
from opkit.align.sorting import sort_regions
from opkit.errors import BadInput
from opkit.layers.dsa import DSA
from opkit.layers.op import Case, LaunchMode, MockRange, Phase
from opkit.nsys_parsers.names import parse_name
from opkit.nsys_parsers.trace import open_trace

VLLM = DSA.region["vllm"]
CASE = Case(Phase.CONTEXT, 1, 1024, 0)
STEP = "execute_context_1(1024)_generation_0(0)"


def shorts(region: Region) -> list[str]:
    return [launch.name.short for launch in region.launches]


def by_nvtx(export: Export, path: Path, case: Case = CASE) -> CaseRegions | None:
    """Regions of the first labelled shape that is the case."""
    with open_trace(export.write(path / "e2e.sqlite")) as trace:
        cases, _ = case_steps(read_labels(trace), ())
        mark_layers(trace, VLLM)
        asked = (case.phase, case.batch, case.tokens)
        chosen = next(c for c in cases if (c.case.phase, c.case.batch, c.case.tokens) == asked)
        return nvtx_regions(chosen, read_steps(trace, chosen.steps))


def one_step(*modules: str) -> Export:
    """A labelled step with a kernel in each module and one outside."""
    made = Export()
    made.range(STEP, 1_000, 9_000)
    made.launch("void outside()", 1_100, 20_000)
    for number, path in enumerate(modules):
        begin = 2_000 + 1_000 * number
        made.range(module(path), begin, begin + 500)
        made.range(module(path, outputs=True), begin + 400, begin + 500)
        made.launch(f"void k{number}()", begin + 100, 30_000 + begin)
    return made


def test_a_mocks_iterations_are_its_regions(tmp_path: Path) -> None:
    with open_trace(mock(iterations=4).write(tmp_path / "mock.sqlite")) as trace:
        regions = mock_regions(trace, "dsa")
        assert silent_iterations(trace, "dsa") == {}
    assert len(regions) == 4 * len(CASES)
    for case in CASES:
        own = [r for r in regions if r.case == case]
        wanted = CONTEXT if case.phase is Phase.CONTEXT else GENERATION
        assert [len(r.launches) for r in own] == [len(wanted)] * 4
        assert {r.variant for r in own} == {"mock"}
        mode = LaunchMode.EAGER if case.phase is Phase.CONTEXT else LaunchMode.GRAPH
        assert {r.mode for r in own} == {mode}
    first = regions[0]
    assert first.gpu_ns == sum(x.end - x.start for x in first.launches)
    assert first.elapsed_ns == first.launches[-1].end - first.launches[0].start
    assert first.launches[0].grid == (1024, 1, 1)


def test_variants_are_kept_apart_and_other_ops_left_out(tmp_path: Path) -> None:
    made = mock(iterations=2, variants=("mock", "strict"), cases=CASES[:1])
    made.range(MockRange("mla", CASE, LaunchMode.EAGER, 0).text(), 1, 2)
    with open_trace(made.write(tmp_path / "mock.sqlite")) as trace:
        regions = mock_regions(trace, "dsa")
        assert [r.variant for r in regions] == ["mock", "mock", "strict", "strict"]
        with pytest.raises(BadInput, match="no kernel was launched inside an `opkit mla"):
            mock_regions(trace, "mla")


def test_iterations_without_a_kernel_are_counted(tmp_path: Path) -> None:
    made = mock(iterations=3, cases=CASES[:1])
    for iteration in (3, 4):
        made.range(MockRange("dsa", CASES[0], LaunchMode.EAGER, iteration).text(), 5, 6)
    with open_trace(made.write(tmp_path / "mock.sqlite")) as trace:
        assert len(mock_regions(trace, "dsa")) == 3
        assert silent_iterations(trace, "dsa") == {CASES[0]: 2}


def test_an_engines_trace_is_no_mock(tmp_path: Path) -> None:
    with (
        open_trace(engine().write(tmp_path / "e2e.sqlite")) as trace,
        pytest.raises(BadInput, match="no kernel was launched inside"),
    ):
        mock_regions(trace, "dsa")


def test_module_ranges_of_the_launch_give_a_region_for_each_layer(tmp_path: Path) -> None:
    found = by_nvtx(engine(), tmp_path)
    assert found is not None
    assert found.method is Method.LAUNCH_NVTX
    assert [r.layer for r in found.regions] == [0, 1, 2, 3] * (len(found.regions) // 4)
    assert {tuple(shorts(r)) for r in found.regions} == {tuple(short for short, _ in CONTEXT)}
    assert (found.attributed, found.unattributed, found.silent_steps) == (1.0, 0, 0)
    assert 0.4 < found.explained < 0.7  # the MLP and the logits are no part of the op


def test_module_ranges_of_the_capture_give_the_regions_of_replays(tmp_path: Path) -> None:
    decode = Case(Phase.GENERATION, 4, 1, 0)
    found = by_nvtx(engine(from_start=True), tmp_path, decode)
    assert found is not None
    assert found.method is Method.NODE_NVTX
    assert len(found.regions) == 5 * 4
    assert {tuple(shorts(r)) for r in found.regions} == {tuple(short for short, _ in GENERATION)}
    assert {r.mode for r in found.regions} == {LaunchMode.GRAPH}


def test_module_ranges_of_a_late_window_do_not_reach_replays(tmp_path: Path) -> None:
    assert by_nvtx(engine(), tmp_path, Case(Phase.GENERATION, 4, 1, 0)) is None


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.7.self_attn", 7),
        ("CUDAGraphWrapper.model.layers.12.self_attn", 12),
        ("model.layers.7.self_attn.indexer", None),
        ("model.layers.7.mlp", None),
        ("model.layers.x.self_attn", None),
    ],
)
def test_only_the_ops_module_is_its_region(path: str, layer: int | None, tmp_path: Path) -> None:
    found = by_nvtx(one_step(path), tmp_path)
    assert (found.regions[0].layer if found else None) == layer
    if found:
        assert shorts(found.regions[0]) == ["k0"]


def test_a_step_whose_op_is_not_found_is_counted(tmp_path: Path) -> None:
    made = one_step("model.layers.0.self_attn")
    made.range(STEP, 20_000, 29_000)
    made.launch("void outside()", 20_100, 90_000)
    made.range(STEP, 30_000, 39_000)  # and one in which nothing ran
    found = by_nvtx(made, tmp_path)
    assert found is not None
    assert (len(found.regions), found.silent_steps) == (1, 2)


def test_kernels_that_no_launch_explains_are_counted_into_their_step(tmp_path: Path) -> None:
    made = one_step("model.layers.0.self_attn", "model.layers.1.self_attn")
    made.kernel("void lost()", 25_000, 999)  # while the step's own kernels ran
    made.kernel("void later()", 900_000, 998)
    found = by_nvtx(made, tmp_path)
    assert found is not None
    assert (found.attributed, found.unattributed) == (3 / 4, 1)
    assert found.lost == (Times("lost", 1, 1_000),)


def test_what_ran_beside_the_op_is_told_by_name(tmp_path: Path) -> None:
    made = one_step("model.layers.0.self_attn")
    for start in (30_000, 40_000):
        made.launch("void beside()", 7_000 + start // 100, start)
    made.launch("void k0()", 8_000, 50_000)  # the op's kernel, but outside its module
    found = by_nvtx(made, tmp_path)
    assert found is not None
    ran = {times.name: times.launches for times in found.outside}
    assert ran["beside"] == 2
    assert ran["k0"] == 1
    own = sum(region.gpu_ns for region in found.regions)
    assert own + sum(times.gpu_ns for times in found.outside) == found.gpu_ns
    assert found.explained == own / found.gpu_ns


def test_kernels_of_another_thread_are_not_in_the_modules_range(tmp_path: Path) -> None:
    made = one_step("model.layers.0.self_attn")
    made.launch("void foreign()", 2_150, 40_000, tid=TID + 1)
    found = by_nvtx(made, tmp_path)
    assert found is not None
    assert [shorts(r) for r in found.regions] == [["k0"]]


def launch(name: str, us: float = 10.0, *, graph: bool = False) -> Launch:
    grid = None if name.startswith("[") else (8, 1, 1)
    return Launch(parse_name(name), 0, round(us * 1000), grid, grid, graph)


def region(*names: str, us: float = 10.0, graph: bool = False) -> Region:
    return Region(CASE, tuple(launch(name, us, graph=graph) for name in names))


def test_the_most_frequent_sequence_is_the_norm() -> None:
    usual, odd, short = region("a", "b"), region("b", "a"), region("a")
    found = sort_regions([odd, usual, short, usual, usual])
    assert found.modal == (usual, usual, usual)
    assert found.odd == (odd, short)
    assert found.misreported == ()


def test_no_regions_are_sorted_into_nothing() -> None:
    found = sort_regions([])
    assert (found.modal, found.misreported, found.odd) == ((), (), ())


@pytest.mark.parametrize(
    ("name", "us", "graph", "set_aside"),
    [
        ("[memcpy DtoD]", 10.0, True, True),
        ("[memcpy HtoD]", 13.0, True, True),  # within a third and a µs of its peers
        ("[memcpy DtoD]", 15.0, True, False),
        ("[memcpy DtoD]", 10.0, False, False),  # only a graph's nodes are misreported
        ("[memset]", 10.0, True, False),
        ("another", 10.0, True, False),
    ],
)
def test_a_graphs_kernel_that_nsys_calls_a_copy_is_set_aside(
    name: str, us: float, graph: bool, set_aside: bool
) -> None:
    usual = region("a", "b", graph=True)
    wrong = replace(usual, launches=(usual.launches[0], launch(name, us, graph=graph)))
    found = sort_regions([usual, usual, wrong])
    assert found.misreported == ((wrong,) if set_aside else ())
    assert found.odd == (() if set_aside else (wrong,))


def test_what_most_replays_misreport_is_no_norm() -> None:
    # Seen on two H200: 32 of 48 regions held a copy where the others and the mock have a kernel.
    right = region("a", "b", graph=True)
    wrong = replace(right, launches=(right.launches[0], launch("[memcpy DtoD]", 10.0, graph=True)))
    found = sort_regions([wrong, right, wrong, wrong])
    assert (found.modal, found.misreported, found.odd) == ((right,), (wrong,) * 3, ())


def test_steps_that_are_not_there_are_not_read(tmp_path: Path) -> None:
    with open_trace(one_step().write(tmp_path / "e2e.sqlite")) as trace:
        read_labels(trace)
        assert mark_layers(trace, VLLM) == 0
        assert read_steps(trace, []) == {}
        assert read_steps(trace, [10_000]) == {}
        assert nvtx_regions(CaseSteps(CASE, (10_000,), (0, 0)), {}) is None
