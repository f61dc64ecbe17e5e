"""Installing tables for aiconfigurator, and the proof that it really reads them.

It says ``[silicon]`` whichever rows it took. The only sound proof is to scale the table by a factor
and to see exactly its operation change by exactly that factor.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import yaml

from opkit.collect.install.estimate import (
    HALF_UNIT_MS,
    Aiconfigurator,
    Estimate,
    command_of,
    estimate,
    find_aiconfigurator,
)
from opkit.collect.install.overlay import Laid, Place, lay_out
from opkit.collect.install.questions import Asked, Found, Question, questions
from opkit.collect.tables.files import META
from opkit.collect.tables.validate import is_text
from opkit.errors import BadInput
from opkit.layers.op import Op, Table

FACTOR = 1.5
# An operation so short that rounding hides a hundredth of the factor proves nothing.
COARSEST = 0.01
_BACKENDS = ("vllm", "trtllm", "sglang")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One operation of the estimate: before and after scaling, milliseconds."""

    name: str
    old_ms: float
    new_ms: float

    @property
    def ratio(self) -> float:
        """After over before; 1 when both are 0."""
        return self.new_ms / self.old_ms if self.old_ms else float(self.new_ms == 0) or float("inf")


@dataclass(frozen=True)
class Proof:
    """Whether an estimate reads a table.

    Attributes:
        table: its name.
        factor: by which its latencies were scaled.
        command: the estimate, as a user would type it.
        row: the row that it asks for; None when the user's shape is in no row.
        scaled: operations that changed by the factor.
        partly: operations of the table's kind that changed otherwise: other rows are mixed in.
        foreign: operations of another kind that changed.
        entries: all operations.
        holds: whether the table is read, and nothing but it changed.
        sentence: the outcome in words.
    """

    table: str
    factor: float
    command: tuple[str, ...]
    row: Found | None
    scaled: tuple[Entry, ...]
    partly: tuple[Entry, ...]
    foreign: tuple[Entry, ...]
    entries: tuple[Entry, ...]
    holds: bool
    sentence: str

    @property
    def layers(self) -> float | None:
        """How many times the row's latency its operation is: the model's layers."""
        if self.row is None or len(self.scaled) != 1:
            return None
        return self.scaled[0].old_ms / float(self.row["latency"])


@dataclass(frozen=True)
class Installed:
    """What was installed.

    Attributes:
        root: the overlay: ``--systems-paths`` of aiconfigurator.
        place: where in it.
        folder: the tables' folder.
        tables: rows of each table, by name.
        aiconfigurator: its version.
        proofs: one for each table; empty without the proof.
        notes: what the user should know.
    """

    root: Path
    place: Place
    folder: Path
    tables: dict[str, int]
    aiconfigurator: str
    proofs: tuple[Proof, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every proof that was made holds."""
        return all(proof.holds for proof in self.proofs)


def install(
    op: Op,
    tables: Path,
    root: Path,
    system: str,
    *,
    backend: str = "",
    version: str = "",
    aiconfigurator: str = "",
    fill: bool = True,
    prove: bool = True,
    factor: float = FACTOR,
    asked: Asked | None = None,
    say: Say = lambda _: None,
) -> Installed:
    """Lay an op's tables out for aiconfigurator and prove that it reads them.

    Args:
        op: the op.
        tables: folder of its tables, as ``write_tables`` leaves it.
        root: the overlay, made when missing.
        system: aiconfigurator's name of the GPU's system, as ``h100_sxm``.
        backend: whose tables they are to be; by default the framework that they name.
        version: of the backend; by default the one that they name.
        aiconfigurator: an interpreter that has it, or its program; see ``find_aiconfigurator``.
        fill: let the installed tables of this version give the rows that these have not.
        prove: run the proof: an estimate, and one more for each table.
        factor: by which the proof scales.
        asked: what the user wants of the estimate.
        say: told what is going on.

    Raises:
        BadInput: no tables, or none that can be placed; no such system; a folder that is not ours.
        ToolMissing, RunFailed: aiconfigurator is missing, or an estimate fails.
    """
    if not 1 < factor < 100:
        raise BadInput(f"the factor must be above 1 and below 100, not {factor}")
    found = {table.name: _read(tables, table) for table in op.tables.values()}
    rows = {name: table for name, table in found.items() if table}
    if not rows:
        raise BadInput(f"{tables}: no tables of {op.name}", f"opkit collect {op.name} makes them")
    tool = find_aiconfigurator(aiconfigurator)
    place = _place(op, rows, tables, system, backend, version)
    files = {f"{name}_perf": tables / f"{name}_perf.parquet" for name in rows}
    say(f"laying out {', '.join(rows)} for {system}, {place.backend} {place.version}")
    laid = lay_out(root.absolute(), tool.systems, place, files, _meta(tables, files), fill=fill)
    proofs = _prove(tool, root.absolute(), laid, place, rows, factor, asked or Asked(), say) \
        if prove else []  # fmt: skip
    return Installed(
        root=root,
        place=place,
        folder=laid.folder,
        tables={name: len(table) for name, table in rows.items()},
        aiconfigurator=tool.version,
        proofs=tuple(proofs),
        notes=(*_flag_notes(files), *_notes(laid, place)),
    )


def _read(folder: Path, table: Table) -> list[dict[str, Any]]:
    """A table's rows: its own columns, framework, version and latency; none without a file.

    Raises:
        BadInput: it is no table of this kind.
    """
    path = folder / f"{table.name}_perf.parquet"
    if not path.exists():
        return []
    wanted = {"framework": "VARCHAR", "version": "VARCHAR", "latency": "DOUBLE"} | {
        name: "VARCHAR" if is_text(name) else "BIGINT" for name in table.columns
    }
    try:
        with duckdb.connect() as db:
            relation = db.read_parquet(str(path))
            types = dict(zip(relation.columns, map(str, relation.types), strict=True))
            wrong = [name for name, kind in wanted.items() if types.get(name) != kind]
            if wrong:
                raise BadInput(f"{path}: no column {wrong[0]} of type {wanted[wrong[0]]}")
            names = ", ".join(f'"{name}"' for name in wanted)
            values = relation.project(names).fetchall()
    except duckdb.Error as error:
        raise BadInput(f"{path}: not a readable table ({error})") from error
    if not values:
        raise BadInput(f"{path}: holds no rows")
    return [dict(zip(wanted, row, strict=True)) for row in values]


def _place(
    op: Op, rows: Mapping[str, list[dict[str, Any]]], folder: Path,
    system: str, backend: str, version: str,
) -> Place:  # fmt: skip
    """Where the tables belong, by what they say and the user wants."""
    told = {
        name: sorted({str(row[name]) for table in rows.values() for row in table})
        for name in ("framework", "version")
    }
    mixed = [f"{name} {', '.join(values)}" for name, values in told.items() if len(values) > 1]
    if mixed:
        raise BadInput(f"{folder}: tables of more than one {mixed[0]}")
    backend = backend or told["framework"][0].lower()
    if backend not in _BACKENDS:
        raise BadInput(
            f"aiconfigurator has no tables of {backend}",
            f"say whose they are to be: --backend {'|'.join(_BACKENDS)} and --version",
        )
    if not version and backend != told["framework"][0].lower():
        raise BadInput(
            f"{told['framework'][0]} {told['version'][0]} is no version of {backend}",
            f"say which version of {backend} they are to be: --version",
        )
    family = next(iter({table.family for table in op.tables.values()}))
    return Place(system, family, backend, version or told["version"][0])


def _meta(folder: Path, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What the tables' ``collection_meta.yaml`` says of each."""
    path = folder / META
    try:
        told = yaml.safe_load(path.read_text("utf-8"))["tables"]
        return {name: dict(told[name]) for name in files}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: does not say how the tables were collected ({error})") from error


def _flag_notes(files: Mapping[str, Path]) -> list[str]:
    """What stands in the rows' flags and casts doubt on them: waivers, kernels never aligned."""
    notes = []
    for flag, what in (
        ("waived", "were collected under a waiver: nothing has proved their mock"),
        ("unaligned_kernels", "launch kernels that the alignment never saw"),
    ):
        for name, path in files.items():
            with duckdb.connect() as db:
                relation = db.read_parquet(str(path))
                if "flags" not in relation.columns:
                    continue
                found = relation.filter(f"contains(flags, '{flag}')").count("*").fetchone()
            if found and found[0]:
                notes.append(f"{found[0]:,} rows of {name} {what}")
    return notes


def _notes(laid: Laid, place: Place) -> list[str]:
    what = f"{place.backend} {place.version}"
    notes = []
    if not laid.queryable:
        notes.append(
            f"with this folder aiconfigurator takes the highest version that it finds: ask for "
            f"--backend-version {place.version}"
        )
    if not laid.shipped:
        notes.append(
            f"aiconfigurator brings nothing for {what}: all other tables are those of earlier "
            "versions"
        )
    if laid.fills:
        notes.append(f"rows that these tables have not come from the installed ones of {what}")
    else:
        notes.append(
            "rows that these tables have not come from earlier versions or another backend, and no "
            "estimate says which: a prefix, head count or dtype not collected may be far off"
        )
    return notes


def _prove(
    tool: Aiconfigurator, root: Path, laid: Laid, place: Place,
    rows: Mapping[str, Sequence[Found]], factor: float, asked: Asked, say: Say,
) -> list[Proof]:  # fmt: skip
    """Estimate with the tables, then with each of them scaled."""
    where = (
        "--system", place.system, "--backend", place.backend,
        "--backend-version", place.version, "--no-color", "--detail", "all",
    )  # fmt: skip
    before: dict[tuple[str, ...], Estimate] = {}
    proofs = []
    for question in questions(rows, asked):
        arguments = (*question.arguments, *where)
        if arguments not in before:
            say("estimating with the tables as they are")
            before[arguments] = estimate(tool, ["--systems-paths", str(root), *arguments])
        say(f"estimating with {question.table} × {factor:g}")
        with tempfile.TemporaryDirectory(prefix="opkit-overlay-") as folder:
            copy = Path(folder) / "systems"
            shutil.copytree(root, copy, symlinks=True)
            scaled = copy / laid.folder.relative_to(root) / f"{question.table}_perf.parquet"
            scale(scaled, factor)
            after = estimate(tool, ["--systems-paths", str(copy), *arguments])
        command = tuple(command_of(["--systems-paths", str(root), *arguments]))
        proofs.append(judge(question, place, factor, command, before[arguments], after))
    return proofs


def scale(path: Path, factor: float) -> None:
    """Multiply the latencies of a table, in place."""
    other = path.with_name(f".{path.name}.scaled")
    with duckdb.connect() as db:
        db.read_parquet(str(path)).project(
            f"* REPLACE (latency * {factor!r} AS latency)"
        ).write_parquet(str(other))
    other.replace(path)


def judge(
    question: Question,
    place: Place,
    factor: float,
    command: tuple[str, ...],
    before: Estimate,
    after: Estimate,
) -> Proof:
    """Compare the estimates before and after scaling.

    The proof holds when at least one operation of the table's kind changed by exactly the factor,
    as far as printed numbers tell, and none of another kind changed at all.
    """
    names = [*before.entries, *(name for name in after.entries if name not in before.entries)]
    entries = tuple(
        Entry(name, before.entries.get(name, 0.0), after.entries.get(name, 0.0)) for name in names
    )
    changed = [entry for entry in entries if entry.new_ms != entry.old_ms]
    own = [entry for entry in changed if re.fullmatch(question.entries, entry.name)]
    scaled = tuple(entry for entry in own if _is_factor(entry, factor))
    partly = tuple(entry for entry in own if entry not in scaled)
    foreign = tuple(entry for entry in changed if entry not in own)
    right_version = before.version == after.version == place.version
    asked_all = [e for e in entries if re.fullmatch(question.entries, e.name)]
    if not right_version:
        sentence = f"the estimate used {place.backend} {before.version}, not {place.version}"
    elif foreign:
        sentence = f"operations that {question.table} does not feed changed too: {_list(foreign)}"
    elif scaled:
        sentence = f"{_list(scaled)} with {question.table} × {factor:g}; nothing else changed"
        if partly:
            sentence = sentence.replace("nothing else", f"{_list(partly)}, nothing else")
    elif partly:
        sentence = (
            f"{_list(partly)} with {question.table} × {factor:g}: rows of another source are mixed "
            "in; ask for a shape that was collected"
        )
    elif asked_all:
        sentence = (
            f"{question.table} is not read: {_list(asked_all)} with its latencies × {factor:g}"
        )
    else:
        sentence = f"the estimate has no operation that {question.table} could feed"
    holds = right_version and bool(scaled) and not foreign
    return Proof(
        question.table, factor, command, question.row, scaled, partly, foreign, entries, holds,
        sentence,
    )  # fmt: skip


def _is_factor(entry: Entry, factor: float) -> bool:
    """Whether the printed numbers can be a value and ``factor`` times it, and tell it well."""
    rounding = HALF_UNIT_MS * (1 + factor) * (1 + 1e-6)
    if rounding > COARSEST * entry.old_ms * (factor - 1):
        return False
    return abs(entry.new_ms - factor * entry.old_ms) <= rounding


def _list(entries: Sequence[Entry]) -> str:
    return ", ".join(
        f"{e.name} {e.old_ms:.3f} → {e.new_ms:.3f} ms (× {e.ratio:.4f})" for e in entries
    )


def command_line(proof: Proof) -> str:
    """The proof's estimate, to be pasted into a shell."""
    return shlex.join(proof.command)
