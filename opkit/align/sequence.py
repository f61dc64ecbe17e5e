"""Find the op's regions by sequence, where no NVTX range reaches: decode replayed from a CUDA
graph.

A layer is delimited by *borders*: kernels that stand directly before or after the op (norms,
usually) and never inside it. Between two borders lies one candidate; those whose kernels agree
with the mock's, or with a region that NVTX delimited in the same trace, are the op. Borders are
learned from such regions, else taken from the op's pattern. So a mock that lacks the op's first or
last kernel cannot shrink the region to fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from opkit.align.match import align_names
from opkit.align.regions import CaseRegions, Launch, Region, StepKernels, summarise
from opkit.align.result import Level, Method
from opkit.align.shapes import CaseSteps
from opkit.layers.op import RegionPattern

# A candidate is the op when this share of the longer of the two sequences agrees. Attention
# against MLP or MoE segments of the same layer agree below 0.3; a mock without its indexer still
# above 0.5.
MIN_AGREEMENT = 0.45


@dataclass(frozen=True)
class Learned:
    """What module ranges of the same trace taught: stems around and inside the op, and its
    layers."""

    borders: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    examples: tuple[tuple[Launch, ...], ...] = ()


def learn(steps: Sequence[StepKernels]) -> Learned:
    """Learn borders from steps whose kernels carry layers."""
    borders: set[str] = set()
    inside: set[str] = set()
    layers: set[int] = set()
    examples: dict[tuple[str, ...], tuple[Launch, ...]] = {}
    for step in steps:
        members = [i for i, layer in enumerate(step.layers) if layer is not None]
        for layer in {step.layers[i] for i in members}:
            own = [i for i in members if step.layers[i] == layer]
            launches = tuple(step.launches[i] for i in own)
            inside |= {launch.name.stem for launch in launches}
            examples.setdefault(tuple(x.name.demangled for x in launches), launches)
            assert layer is not None
            layers.add(layer)
            for neighbour in (own[0] - 1, own[-1] + 1):
                if 0 <= neighbour < len(step.launches):
                    borders.add(step.launches[neighbour].name.stem)
    return Learned(
        frozenset(borders - inside), frozenset(inside), frozenset(layers), tuple(examples.values())
    )


def sequence_regions(
    case: CaseSteps,
    steps: dict[int, StepKernels],
    mock: tuple[Launch, ...],
    learned: Learned,
    pattern: RegionPattern,
) -> CaseRegions | None:
    """Regions by sequence, or None when no candidate agrees or no border is known.

    Args:
        case: the shape and its steps.
        steps: the steps' kernels in launch order.
        mock: the mock's sequence for this shape.
        learned: what module ranges of the same trace taught.
        pattern: the op's declared borders, used when nothing was learned.
    """
    used = [steps[i] for i in case.steps if i in steps]
    references = (mock, *learned.examples)
    seen: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    regions: list[Region] = []
    for step in used:
        signature = tuple(launch.name.demangled for launch in step.launches)
        if signature not in seen:
            spans = _candidates(step.launches, learned, pattern, mock)
            seen[signature] = [
                span for span in spans if _agrees(step.launches[slice(*span)], references)
            ]
        regions += [
            Region(case.case, step.launches[slice(*span)], layer)
            for layer, span in enumerate(seen[signature])
        ]
    if not regions:
        return None
    silent = len(case.steps) - sum(
        bool(seen[tuple(x.name.demangled for x in step.launches)]) for step in used
    )
    return summarise(case, used, regions, Method.SEQUENCE, silent)


def _candidates(
    launches: tuple[Launch, ...],
    learned: Learned,
    pattern: RegionPattern,
    mock: tuple[Launch, ...],
) -> list[tuple[int, int]]:
    """Half-open spans between neighbouring borders. Spans at the step's edges have only one: left
    out."""
    if learned.borders:
        at = [i for i, launch in enumerate(launches) if launch.name.stem in learned.borders]
    else:
        own = {launch.name.stem for launch in mock}
        at = [
            i
            for i, launch in enumerate(launches)
            if launch.name.stem not in own
            and any(re.search(border, launch.name.stem) for border in pattern.borders)
        ]
    return [(a + 1, b) for a, b in pairwise(at) if b > a + 1]


def _agrees(launches: tuple[Launch, ...], references: tuple[tuple[Launch, ...], ...]) -> bool:
    """Whether enough kernels agree with those of any reference sequence."""
    names = [launch.name for launch in launches]
    for reference in references:
        longer = max(len(names), len(reference))
        if min(len(names), len(reference)) / longer < MIN_AGREEMENT:
            continue  # not even if all of the shorter agreed
        pairs = align_names([launch.name for launch in reference], names)
        agreeing = sum(1 for _, _, level in pairs if level in (Level.SAME, Level.VARIANT))
        if agreeing / longer >= MIN_AGREEMENT:
            return True
    return False
