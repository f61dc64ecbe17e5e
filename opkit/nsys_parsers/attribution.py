"""Which step and which module a launch belongs to: the ranges open around it.

A range of the launching thread decides. A thread that labels nothing itself (PyTorch's autograd
launches from one) gets what another thread of its process had open at the time; rows say which way
was used. Texts become *paths*: ``model.layers.5.self_attn`` for a module marker, else the texts of
the enclosing ranges, joined by ``/``.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np

from opkit.nsys_parsers.kernels import THREAD_BITS
from opkit.nsys_parsers.ranges import COUNTER_SQL, MODULE_SQL, STEP_SQL
from opkit.nsys_parsers.reading import Via
from opkit.nsys_parsers.stacks import NOWHERE, Array, Int64, Stacks, depths, write
from opkit.nsys_parsers.strings import write_texts

# Ranges nested deeper share the path of the one at this depth; deeper stacks are damaged files.
MAX_DEPTH = 64
NO_PATH = 0


@dataclass(frozen=True)
class Placed:
    """For each moment asked: arrays of one shape.

    Attributes:
        range: number of the innermost range, -1 if none.
        path: its path, ``NO_PATH`` if none.
        step: number of the innermost step, -1 if none.
        via: how the path was found (``Via``).
        step_via: how the step was found.
    """

    range: Int64
    path: Int64
    step: Int64
    via: Int64
    step_via: Int64


@dataclass(frozen=True)
class _Labels:
    """What the texts of ranges mean: arrays by label id (ids count from 1)."""

    text: list[str]
    module: list[str]
    step: Array
    twin: Array


class _Ranges:
    """One kind of ranges (steps, or all others), by thread and by process."""

    def __init__(self, tid: Int64, start: Int64, end: Int64) -> None:
        self.tid, self.start, self.end = tid, start, end
        self.by_thread = Stacks(tid, start, end)
        self._by_process: Stacks | None = None

    def innermost(self, tid: Int64, moments: Int64, other_threads: bool) -> tuple[Int64, Int64]:
        found = self.by_thread.innermost(tid, moments)
        via = np.where(found >= 0, int(Via.THREAD), int(Via.NONE))
        if other_threads:
            lost = np.flatnonzero(~self.by_thread.has(tid))
            if len(lost):
                pid = self.process(tid[lost])
                found[lost] = self._processes().innermost(pid, moments[lost])
                via[lost[found[lost] >= 0]] = int(Via.TIME)
        return found, via

    def _processes(self) -> Stacks:
        if self._by_process is None:
            self._by_process = Stacks(self.process(self.tid), self.start, self.end)
        return self._by_process

    @staticmethod
    def process(tid: Int64) -> Int64:
        return tid - (tid & THREAD_BITS)


class Attribution:
    """The ranges of one export, ready to be asked about launches and node creations."""

    def __init__(
        self, db: duckdb.DuckDBPyConnection, step_pattern: str = "", other_threads: bool = True
    ) -> None:
        """Reads tables ``range`` and ``label``; creates ``module_range``, ``path`` and ``step``.

        Args:
            db: connection with the tables that ``ranges.load`` makes.
            step_pattern: regular expression (RE2) of texts that label a step, instead of the
                labels of known engines.
            other_threads: whether threads that label nothing get what others had open.
        """
        self.other_threads = other_threads
        labels = _labels(db, step_pattern)
        rows = db.execute('SELECT tid, start, "end", text FROM range').fetchnumpy()
        tid, start, end, text = (np.asarray(rows[k]) for k in ("tid", "start", "end", "text"))
        is_step = labels.step[text]
        # A twin with a module's outputs lies inside the module's range and covers nothing; an
        # empty range neither.
        is_module = ~is_step & ~labels.twin[text] & (end > start)
        del rows
        self._steps = _Ranges(tid[is_step], start[is_step], end[is_step])
        self._modules = _Ranges(tid[is_module], start[is_module], end[is_module])
        text_of_step, text_of_module = text[is_step], text[is_module]
        del tid, start, end, text, is_step, is_module
        self.paths = self._write_paths(db, text_of_module, labels)
        self._step_ids = self._write_steps(db, text_of_step)

    def place(self, tid: Int64, moments: Int64) -> Placed:
        """Ranges around moments; ``tid`` and ``moments`` (ns) of shape (moments,)."""
        found, via = self._modules.innermost(tid, moments, self.other_threads)
        step, step_via = self._steps.innermost(tid, moments, self.other_threads)
        path = np.append(self.paths, NO_PATH)[found]
        via[path == NO_PATH] = int(Via.NONE)
        return Placed(found, path, np.append(self._step_ids, NOWHERE)[step], via, step_via)

    def _write_paths(self, db: duckdb.DuckDBPyConnection, text: Int64, labels: _Labels) -> Int64:
        """Tables ``path(id, path, module)`` and ``module_range``; the path id of each range."""
        parent = self._modules.by_thread.parent
        depth = np.minimum(depths(parent), MAX_DEPTH)
        ids = np.full(len(text), NO_PATH, np.int64)
        known: dict[tuple[str, str], int] = {("", ""): NO_PATH}
        found = [("", "")]  # path and module, by id
        by_depth = np.argsort(depth, kind="stable")
        ends = np.searchsorted(depth[by_depth], np.arange(MAX_DEPTH + 2))
        for level in range(MAX_DEPTH):
            here = by_depth[ends[level] : ends[level + 1]]
            if not len(here):
                break
            above = np.where(parent[here] >= 0, ids[parent[here]], NO_PATH)
            distinct, which = np.unique(above << 32 | text[here], return_inverse=True)
            made = np.empty(len(distinct), np.int64)
            for number, key in enumerate(distinct.tolist()):
                own = key & 0xFFFFFFFF
                path, module = found[key >> 32]
                named = below(path, module, labels.text[own], labels.module[own])
                made[number] = known.setdefault(named, len(known))
                if made[number] == len(found):
                    found.append(named)
            ids[here] = made[which]
        _shallow(ids, parent, depth)
        paths, modules = zip(*found, strict=True)
        write_texts(db, "path", range(len(found)), path=paths, module=modules)
        write(
            db,
            "module_range",
            {
                "id": np.arange(len(text)),
                "tid": self._modules.tid,
                "start": self._modules.start,
                "end": self._modules.end,
                "text": text,
                "path": ids,
            },
        )
        return ids

    def _write_steps(self, db: duckdb.DuckDBPyConnection, text: Int64) -> Int64:
        """Table ``step(id, tid, start, "end", text)``; ids in order of start."""
        order = np.lexsort((self._steps.tid, self._steps.start))
        ids = np.empty(len(order), np.int64)
        ids[order] = np.arange(len(order))
        write(
            db,
            "step",
            {
                "id": ids,
                "tid": self._steps.tid,
                "start": self._steps.start,
                "end": self._steps.end,
                "text": text,
            },
        )
        return ids


def below(path: str, module: str, text: str, marker: str) -> tuple[str, str]:
    """Path and module of a range inside a range of ``path`` and ``module``.

    A marker names its whole path, so it replaces what encloses it; any other text is added. But a
    module that layers share (vLLM's ``rotary_emb``) is marked with the name of one of them
    wherever it is called: numbers in a marker's path are those of what encloses it.

    Args:
        path, module: of the enclosing range; empty if there is none.
        text: of the range.
        marker: the module that the range marks, or empty.
    """
    if not marker:
        return "/".join(part for part in (path, text) if part), module
    outer, inner = module.split("."), marker.split(".")
    for at, (above, own) in enumerate(zip(outer, inner, strict=False)):
        if above != own and not (above.isdecimal() and own.isdecimal()):
            break
        inner[at] = above
    whole = ".".join(inner)
    return whole, whole


def _shallow(ids: Int64, parent: Int64, depth: Int64) -> None:
    """Give ranges at ``MAX_DEPTH`` and below the path of the nearest one above that has one."""
    deep = np.flatnonzero(depth == MAX_DEPTH)
    above = parent.copy()
    climbing = deep
    while len(climbing := climbing[depth[above[climbing]] == MAX_DEPTH]):
        # All jump at once, so that each step doubles what the next one covers.
        above[climbing] = above[above[climbing]]
    ids[deep] = ids[above[deep]]


def _labels(db: duckdb.DuckDBPyConnection, step_pattern: str) -> _Labels:
    rows = db.execute(
        """
        SELECT id, regexp_replace(text, ?, ''), regexp_extract(text, ?, 1), regexp_matches(text, ?),
               contains(text, '''Module'':') AND contains(text, '''Outputs'':')
        FROM label ORDER BY id
        """,
        [COUNTER_SQL, MODULE_SQL, step_pattern or STEP_SQL],
    ).fetchall()
    none = (0, "", "", False, False)  # ids count from 1
    columns = list(zip(none, *rows, strict=True))
    return _Labels(
        list(columns[1]), list(columns[2]), np.array(columns[3], bool), np.array(columns[4], bool)
    )
