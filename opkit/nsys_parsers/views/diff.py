"""Do two regions, or two traces, launch the same kernels equally often?

Kernels decide; copies and fills are shown beside them. Names are demangled: other tiles of one GEMM
are other kernels here (``opkit align`` knows variants; a diff only says what is).
"""

from __future__ import annotations

from dataclasses import dataclass

from opkit.errors import BadInput
from opkit.nsys_parsers.table import KernelTable
from opkit.nsys_parsers.views.sequence import ORDER
from opkit.nsys_parsers.views.view import Selection

# Comparing order holds both sequences of name ids in memory; beyond this it is left out.
LONGEST_SEQUENCE = 5_000_000


@dataclass(frozen=True)
class Side:
    """One side of a name: executions, and their times in ns."""

    calls: int = 0
    total_ns: int = 0
    median_ns: float | None = None
    shapes: int = 0


@dataclass(frozen=True)
class Difference:
    """One name on both sides.

    Attributes:
        shapes_equal: whether its grids and blocks occur equally often on both sides.
    """

    name: str
    short: str
    family: str
    kind: str
    a: Side
    b: Side
    shapes_equal: bool

    @property
    def equal(self) -> bool:
        """Launched equally often."""
        return self.a.calls == self.b.calls


@dataclass(frozen=True)
class Diff:
    """What two regions launch.

    Attributes:
        rows: one a name, largest difference in calls first, then longest.
        equal: every kernel is launched equally often on both sides.
        same_order: the same kernels in the same order; None when not compared.
        losses: what nsys reports lost, of either side.
    """

    rows: tuple[Difference, ...]
    equal: bool
    same_order: bool | None
    losses: tuple[str, ...]


def diff(a: KernelTable, b: KernelTable, of_a: Selection, of_b: Selection) -> Diff:
    """Compare what two selections launch.

    Raises:
        BadInput: a side launches nothing, or holds graphs whose kernels cannot be seen.
    """
    found = []
    for table, selection in ((a, of_a), (b, of_b)):
        _refuse_blind(table)
        counted = _counts(table, selection)
        if not any(kind == "kernel" for kind, _ in counted):
            raise BadInput(
                f"{table.facts[0].path}: no kernel was launched in {selection}",
                "`opkit trace steps` and `opkit trace modules` list what there is",
            )
        found.append(counted)
    left, right = found
    rows = []
    for key in left.keys() | right.keys():
        short, family, side_a, shapes_a = left.get(key, ("", "", Side(), ()))
        short_b, family_b, side_b, shapes_b = right.get(key, ("", "", Side(), ()))
        rows.append(
            Difference(
                key[1], short or short_b, family or family_b, key[0], side_a, side_b,
                shapes_a == shapes_b,
            )
        )  # fmt: skip
    rows.sort(key=lambda r: (r.equal, -max(r.a.total_ns, r.b.total_ns), r.name))
    equal = all(row.equal for row in rows if row.kind == "kernel")
    losses = {loss for table in (a, b) for facts in table.facts for loss in facts.losses}
    return Diff(
        tuple(rows), equal, _same_order(a, b, of_a, of_b) if equal else False, tuple(sorted(losses))
    )


def _refuse_blind(table: KernelTable) -> None:
    for facts in table.facts:
        if facts.whole_graphs:
            raise BadInput(
                f"{facts.path}: {facts.whole_graphs:,} launches of CUDA graphs "
                f"({facts.whole_graphs_ns / 1e6:,.1f} ms of GPU time) were recorded whole; the "
                "kernels inside are not visible, so they cannot be compared",
                "record again with --cuda-graph-trace=node",
            )


Counted = dict[tuple[str, str], tuple[str, str, Side, tuple[object, ...]]]


def _counts(table: KernelTable, selection: Selection) -> Counted:
    """By (kind, demangled name); the shapes are (grid, block, calls), sorted."""
    rows = table.rows(
        f"""
        WITH chosen AS (
            SELECT kind, name_id, "end" - start AS ns,
                   (grid_x, grid_y, grid_z, block_x, block_y, block_z)::VARCHAR AS shape
            FROM kernel k WHERE {selection.where(table)}),
        shaped AS (
            SELECT kind, name_id, list((shape, calls) ORDER BY shape)::VARCHAR AS shapes,
                   count(*) AS count
            FROM (SELECT kind, name_id, shape, count(*) AS calls FROM chosen GROUP BY 1, 2, 3)
            GROUP BY 1, 2),
        timed AS (
            SELECT kind, name_id, count(*) AS calls, sum(ns)::BIGINT AS total, median(ns) AS median
            FROM chosen GROUP BY 1, 2)
        SELECT t.kind, n.name, n.short, n.family, t.calls, t.total, t.median, s.count, s.shapes
        FROM timed t JOIN shaped s USING (kind, name_id) JOIN name n ON n.id = t.name_id
        """
    )
    return {
        (kind, name): (short, family, Side(calls, total, median, count), (shapes,))
        for kind, name, short, family, calls, total, median, count, shapes in rows
    }


def _same_order(a: KernelTable, b: KernelTable, of_a: Selection, of_b: Selection) -> bool | None:
    """Whether both launch their kernels in one order, by a digest of the sequence of names."""
    digests = []
    for table, selection in ((a, of_a), (b, of_b)):
        where = f"{selection.where(table)} AND k.kind = 'kernel'"
        if table.rows(f"SELECT count(*) FROM kernel k WHERE {where}")[0][0] > LONGEST_SEQUENCE:
            return None
        digests.append(
            table.rows(
                f"""
                SELECT md5(string_agg(hash, '' ORDER BY position)) FROM (
                    SELECT md5(n.name) AS hash, row_number() OVER (ORDER BY {ORDER}) AS position
                    FROM kernel k JOIN name n ON n.id = k.name_id WHERE {where})
                """
            )[0][0]
        )
    return bool(digests[0] == digests[1])
