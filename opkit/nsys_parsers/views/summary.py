"""What a trace holds, how much of it is attributed, and which ranks do the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opkit.nsys_parsers.export import TraceFacts
from opkit.nsys_parsers.ranks import Rank
from opkit.nsys_parsers.reading import Via
from opkit.nsys_parsers.table import KernelTable

# Ranks of one tensor-parallel group run the same kernels; a window cuts their edges differently.
ALIKE = 0.02


@dataclass(frozen=True)
class Attributed:
    """GPU time in ns by how its module, or step, was found (``attribution.Via``)."""

    thread: int
    node: int
    time: int
    none: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.thread + self.node + self.time + self.none

    @property
    def share(self) -> float:
        """How much of the time is attributed, 0 to 1."""
        return 1 - self.none / self.total if self.total else 0.0


@dataclass(frozen=True)
class Summary:
    """One trace, or the ranks of one run. Times in ns.

    Attributes:
        facts: of each file.
        ranks: processes that ran kernels.
        one_clock: times of different files can be compared.
        alike: ranks that launch the same kernels equally often (but for ``ALIKE`` of them), in
            groups: tensor-parallel duplicates of one another.
        kernels: executions of kernels; copies and fills apart.
        copies: copies and fills.
        gpu_ns: sum of all executions.
        span_ns: from the first start to the last end.
        busy_ns: time in which any kernel, copy or fill ran, summed over ranks.
        names: distinct kernel names.
        streams: distinct (device, stream).
        from_graphs: executions replayed from graphs.
        no_launch: executions whose launch is not in the export.
        no_node: replayed executions whose node's creation is not in the export.
        modules: GPU time by how its module was found.
        steps: GPU time by how its step was found.
        step_count: labelled steps, counted once for all ranks.
        ranges: NVTX ranges that are no steps.
        paths: distinct module paths that launched anything.
        families: (family, GPU time, executions), longest first.
        top: (short name, GPU time, executions), longest first.
    """

    facts: tuple[TraceFacts, ...]
    ranks: tuple[Rank, ...]
    one_clock: bool
    alike: tuple[tuple[int, ...], ...]
    kernels: int
    copies: int
    gpu_ns: int
    span_ns: int
    busy_ns: int
    names: int
    streams: int
    from_graphs: int
    no_launch: int
    no_node: int
    modules: Attributed
    steps: Attributed
    step_count: int
    ranges: int
    paths: int
    families: tuple[tuple[str, int, int], ...]
    top: tuple[tuple[str, int, int], ...]


def summary(table: KernelTable, top: int = 8) -> Summary:
    """Summarise a trace; ``top`` families and names are told."""
    return Summary(
        facts=table.facts,
        ranks=table.ranks,
        one_clock=table.one_clock,
        alike=alike(table),
        busy_ns=_busy(table),
        modules=_attributed(table, "via"),
        steps=_attributed(table, "step_via"),
        step_count=_count(table, "SELECT count(DISTINCT number) FROM step"),
        ranges=_count(table, "SELECT count(*) FROM range"),
        paths=_count(table, "SELECT count(DISTINCT path_id) FROM kernel WHERE path_id <> 0"),
        families=_longest(table, "family", top),
        top=_longest(table, "short", top),
        **_totals(table),
    )


def alike(table: KernelTable) -> tuple[tuple[int, ...], ...]:
    """Groups of two and more ranks that launch the same kernels equally often.

    Ranks are alike when the kernels that one launches more often than the other are at most
    ``ALIKE`` of either's. A rank belongs to the first group that it fits.
    """
    counts: dict[int, dict[int, int]] = {}
    for rank, name, calls in table.rows(
        "SELECT rank, name_id, count(*) FROM kernel WHERE kind = 'kernel' AND rank IS NOT NULL "
        "GROUP BY 1, 2"
    ):
        counts.setdefault(rank, {})[name] = calls
    groups: list[list[int]] = []
    for rank in sorted(counts):
        home = next((g for g in groups if _alike(counts[g[0]], counts[rank])), None)
        if home is None:
            groups.append([rank])
        else:
            home.append(rank)
    return tuple(tuple(group) for group in groups if len(group) > 1)


def _alike(one: dict[int, int], other: dict[int, int]) -> bool:
    apart = sum(abs(one.get(n, 0) - other.get(n, 0)) for n in one.keys() | other.keys())
    return apart <= ALIKE * min(sum(one.values()), sum(other.values()))


def _totals(table: KernelTable) -> dict[str, Any]:
    names = (
        "kernels", "copies", "gpu_ns", "span_ns", "names", "streams", "from_graphs", "no_launch",
        "no_node",
    )  # fmt: skip
    row = table.rows(
        """
        SELECT count(*) FILTER (kind = 'kernel'), count(*) FILTER (kind <> 'kernel'),
               sum("end" - start)::BIGINT, max("end") - min(start),
               (SELECT count(*) FROM (SELECT DISTINCT name_id FROM kernel WHERE kind = 'kernel')),
               (SELECT count(*) FROM (SELECT DISTINCT file, pid, device, stream FROM kernel)),
               count(*) FILTER (graph_node IS NOT NULL), count(*) FILTER (launch_start IS NULL),
               count(*) FILTER (graph_node IS NOT NULL AND node_start IS NULL)
        FROM kernel
        """
    )[0]
    return dict(zip(names, row, strict=True))


def _busy(table: KernelTable) -> int:
    """Union of the executions' intervals, per process and device."""
    import numpy as np  # takes longer to import than most answers

    busy = 0
    for file, pid, device in table.rows("SELECT DISTINCT file, pid, device FROM kernel"):
        found = table.db.execute(
            'SELECT start, "end" FROM kernel WHERE file = ? AND pid = ? '
            "AND device IS NOT DISTINCT FROM ?",
            [file, pid, device],
        ).fetchnumpy()
        start, end = np.asarray(found["start"]), np.asarray(found["end"])
        order = np.argsort(start, kind="stable")
        start, latest = start[order], np.maximum.accumulate(end[order])
        before = np.append(start[:1], latest[:-1])
        busy += int(np.maximum(latest - np.maximum(start, before), 0).sum())
    return busy


def _attributed(table: KernelTable, column: str) -> Attributed:
    found = dict(table.rows(f'SELECT {column}, sum("end" - start)::BIGINT FROM kernel GROUP BY 1'))
    return Attributed(
        *(int(found.get(int(via), 0)) for via in (Via.THREAD, Via.NODE, Via.TIME, Via.NONE))
    )


def _longest(table: KernelTable, level: str, top: int) -> tuple[tuple[str, int, int], ...]:
    rows = table.rows(
        f"""
        SELECT n.{level}, sum(k.ns)::BIGINT, sum(k.calls)::BIGINT FROM (
            SELECT name_id, sum("end" - start) AS ns, count(*) AS calls FROM kernel GROUP BY 1) k
        JOIN name n ON n.id = k.name_id GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {top}
        """
    )
    return tuple((name, ns, calls) for name, ns, calls in rows)


def _count(table: KernelTable, sql: str) -> int:
    return int(table.rows(sql)[0][0])
