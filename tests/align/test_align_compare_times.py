"""When a time has changed between two alignments: by more than it spreads, in either direction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_align_compare import BASE, aligned, case

from opkit.align.compare import KERNEL, compare_alignments
from opkit.align.comparison import Pace


def test_a_shape_that_spreads_must_differ_by_more() -> None:
    """GIVEN 9 % more time, THEN it has changed if regions repeat within 1 %, and not within 3 %."""
    slower = [replace(k, median_ns=round(k.median_ns * 1.09)) for k in BASE]
    for share, pace in ((0.01, Pace.SLOWER), (0.03, Pace.STEADY)):
        sides = []
        for kernels in (BASE, slower):
            made = case(BASE, kernels)
            ns = made.e2e.gpu_ns
            samples = tuple(round(ns * (1 + n * share)) for n in (-1, 0, 1) * 4)
            sides.append(replace(made, e2e=replace(made.e2e, samples_ns=samples)))
        found = compare_alignments(*(aligned(side) for side in sides))
        assert found.phases[0].cases[0].e2e.pace is pace


@pytest.mark.parametrize("factor", [1.14, 1.16, 1.17, 1.2])
def test_b_against_a_finds_what_a_against_b_does(factor: float) -> None:
    long = replace(BASE[2], mad_ns=0)
    sides = [
        aligned(case([replace(long, median_ns=ns)])) for ns in (97_000, round(97_000 * factor))
    ]
    there, back = (compare_alignments(*pair).phases[0].cases[0] for pair in (sides, sides[::-1]))
    paces = [(one.e2e.pace, one.e2e.kernels[0].pace) for one in (there, back)]
    kernel = Pace.SLOWER if factor > 1 + KERNEL else Pace.STEADY
    swapped = {Pace.SLOWER: Pace.FASTER, Pace.STEADY: Pace.STEADY}
    assert paces == [(Pace.SLOWER, kernel), (Pace.FASTER, swapped[kernel])]
