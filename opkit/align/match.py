"""Match: the mock's kernel sequence laid beside the engine's, kernel by kernel, in launch order.

Two sequences are aligned (Needleman and Wunsch 1970, global, linear gaps), not two bags compared:
a kernel that moved shows as missing in one place and extra in another.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from opkit.align.policy import Policy, Role
from opkit.align.regions import Launch, Region
from opkit.align.result import KernelPair, KernelStat, Level
from opkit.nsys_parsers.names import KernelName

Pairing = tuple[int | None, int | None, Level]

# What two kernels standing side by side are worth. Two gaps cost less than a pairing of unlike
# names, and an exact name is worth more than any weaker agreement, so that exact names win where
# both are possible.
_SCORES = {Level.SAME: 4.0, Level.VARIANT: 3.0, Level.ROLE: 2.5, Level.DTYPE: 2.0}
_GAP = -1.0


def name_level(mock: KernelName, e2e: KernelName, roles: Sequence[Role] = ()) -> Level | None:
    """How well two names agree, or None when they do not."""
    if mock.demangled == e2e.demangled:
        return Level.SAME
    if mock.stem == e2e.stem and mock.family == e2e.family:
        alike = (mock.dtypes, mock.typed) == (e2e.dtypes, e2e.typed)
        return Level.VARIANT if alike else Level.DTYPE
    for role in roles:
        if re.search(role.mock, mock.demangled) and re.search(role.e2e, e2e.demangled):
            return Level.ROLE
    return None


def align_names(
    mock: Sequence[KernelName], e2e: Sequence[KernelName], roles: Sequence[Role] = ()
) -> list[Pairing]:
    """Best global alignment of two name sequences: (mock index, e2e index, level) in launch
    order."""
    rows, columns = len(mock), len(e2e)
    levels = _levels(mock, e2e, roles)
    score = [
        [_GAP * (i + j) if 0 in (i, j) else 0.0 for j in range(columns + 1)]
        for i in range(rows + 1)
    ]
    for i in range(rows):
        above, row = score[i], score[i + 1]
        for j, level in enumerate(levels[i]):
            best = max(above[j + 1], row[j]) + _GAP
            if level is not None:
                best = max(best, above[j] + _SCORES[level])
            row[j + 1] = best
    return _trace_back(score, levels)


def _levels(
    mock: Sequence[KernelName], e2e: Sequence[KernelName], roles: Sequence[Role]
) -> list[list[Level | None]]:
    """How well each pair of names agrees, by mock index and e2e index. Names repeat: two are
    compared once, and a row stands for all of the mock's that are called the same."""
    places: dict[KernelName, list[int]] = {}
    for j, name in enumerate(e2e):
        places.setdefault(name, []).append(j)
    rows: dict[KernelName, list[Level | None]] = {}
    for name in dict.fromkeys(mock):
        row = rows[name] = [None] * len(e2e)
        for other, at in places.items():
            level = name_level(name, other, roles)
            for j in at if level is not None else ():
                row[j] = level
    return [rows[name] for name in mock]


def _trace_back(score: list[list[float]], levels: list[list[Level | None]]) -> list[Pairing]:
    pairs: list[Pairing] = []
    i, j = len(score) - 1, len(score[0]) - 1
    while i or j:
        level = levels[i - 1][j - 1] if i and j else None
        if level is not None and score[i][j] == score[i - 1][j - 1] + _SCORES[level]:
            i, j = i - 1, j - 1
            pairs.append((i, j, level))
        elif i and score[i][j] == score[i - 1][j] + _GAP:
            i -= 1
            pairs.append((i, None, Level.MOCK_ONLY))
        else:
            j -= 1
            pairs.append((None, j, Level.E2E_ONLY))
    return pairs[::-1]


def kernel_stat(launches: Sequence[Launch], starts: Sequence[int]) -> KernelStat:
    """Statistics of one place of the sequence over all regions.

    Args:
        launches: one a region.
        starts: the first start of each of these regions, ns.
    """
    times = sorted(launch.duration for launch in launches)
    median = statistics.median(times)
    some = launches[0]
    grids = {launch.grid for launch in launches}
    blocks = {launch.block for launch in launches}
    return KernelStat(
        name=some.name.demangled,
        short=some.name.short,
        family=some.name.family,
        grid=some.grid if len(grids) == 1 else None,
        block=some.block if len(blocks) == 1 else None,
        calls=len(times),
        median_ns=round(median),
        min_ns=times[0],
        max_ns=times[-1],
        mad_ns=round(statistics.median(abs(t - median) for t in times)),
        offset_ns=round(
            statistics.median(x.start - first for x, first in zip(launches, starts, strict=True))
        ),
    )


def match_regions(
    mock: Sequence[Region], e2e: Sequence[Region], policy: Policy
) -> tuple[KernelPair, ...]:
    """Match two sides of a case; every region of a side must have the same kernel sequence.

    Args:
        mock: the mock's regions (at least one).
        e2e: the engine's regions (at least one).
        policy: the share from which a kernel is key, and declared roles.
    """
    names = [[launch.name for launch in side[0].launches] for side in (mock, e2e)]
    stats = [_columns(mock), _columns(e2e)]
    totals = [max(1, sum(stat.median_ns for stat in side)) for side in stats]
    pairs = []
    for i, j, level in align_names(names[0], names[1], policy.roles):
        left = stats[0][i] if i is not None else None
        right = stats[1][j] if j is not None else None
        glue = (names[1][j] if j is not None else names[0][i or 0]).glue
        share = max(
            left.median_ns / totals[0] if left else 0.0,
            right.median_ns / totals[1] if right else 0.0,
        )
        pairs.append(
            KernelPair(left, right, level, share >= policy.key_share or not glue, glue, share)
        )
    return tuple(pairs)


def _columns(regions: Sequence[Region]) -> list[KernelStat]:
    starts = [min(launch.start for launch in region.launches) for region in regions]
    places = zip(*(region.launches for region in regions), strict=True)
    return [kernel_stat(place, starts) for place in places]
