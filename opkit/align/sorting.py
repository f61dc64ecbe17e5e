"""Regions of one side, sorted: the most frequent sequence, misreported copies of it, others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from opkit.align.regions import Region


@dataclass(frozen=True)
class Sorted:
    """Regions of one side of a case, by whether they launch the most frequent sequence.

    Attributes:
        modal: those that do.
        misreported: those that would, but for graph nodes that nsys calls a copy where the others
            have a kernel of the same duration. Seen with CUPTI 12.5 under a CUDA 13 driver: a node
            takes the record of a copy node from a graph that was destroyed before
            (``docs/development.md``).
        odd: all others.
    """

    modal: tuple[Region, ...]
    misreported: tuple[Region, ...]
    odd: tuple[Region, ...]


# A misreported node keeps its own times: they agree with its peers' within noise of short kernels.
_SAME_DURATION, _SAME_DURATION_NS = 0.35, 1000


def sort_regions(regions: Iterable[Region]) -> Sorted:
    """Sort regions into those of the most frequent kernel sequence and others."""
    members = list(regions)
    if not members:
        return Sorted((), (), ())
    common = _true_signature(members)
    modal = tuple(region for region in members if region.signature == common)
    others = [region for region in members if region.signature != common]
    wrong = tuple(region for region in others if _misreported(region, modal[0]))
    odd = tuple(region for region in others if region not in wrong)
    return Sorted(modal, wrong, odd)


def _true_signature(members: list[Region]) -> tuple[str, ...]:
    """The most frequent sequence; or, when that one is another misreported, the other: nsys may
    call a kernel a copy in most replays of a graph."""
    first: dict[tuple[str, ...], Region] = {}
    for region in members:
        first.setdefault(region.signature, region)
    ranked = [name for name, _ in Counter(r.signature for r in members).most_common()]
    common = ranked[0]
    for other in ranked[1:]:
        if _misreported(first[common], first[other]):
            common = other
    return common


def _misreported(region: Region, peer: Region) -> bool:
    """Whether ``region`` differs from ``peer`` only in kernels reported as copies by a graph
    trace."""
    if len(region.launches) != len(peer.launches):
        return False
    return all(
        ours.name == theirs.name
        or (
            ours.from_graph
            and ours.name.demangled.startswith("[memcpy")
            and theirs.grid is not None
            and abs(ours.duration - theirs.duration)
            <= _SAME_DURATION * theirs.duration + _SAME_DURATION_NS
        )
        for ours, theirs in zip(region.launches, peer.launches, strict=True)
    )
