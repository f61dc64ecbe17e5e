"""``opkit comm``: worlds one after the other, rows on the disk as they come, tables at the end.

A case that ends its world is tried once more, in a fresh world and after all others; then it is
quarantined: reported with its error, and the run goes on.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opkit.collect.comm.host import Host, inspect_host, manifest_of
from opkit.collect.comm.plan import (
    CommCase,
    CommOptions,
    World,
    case_key,
    estimate_seconds,
    make_worlds,
    series_of,
)
from opkit.collect.comm.processes import Launcher, default_launcher
from opkit.collect.comm.report import CommLine, line_of
from opkit.collect.comm.tables import TABLES, columns_of, in_tables, write_comm_tables
from opkit.collect.comm.world import Broken, Heard, run_world
from opkit.collect.measurement import measurement_from_json
from opkit.collect.tables.validate import Problem
from opkit.collect.tables.write import TableFiles
from opkit.collect.work import Fault, Row, build_digest
from opkit.collect.workers.gpus import list_gpus
from opkit.collect.workers.parts import Part, Parts, read_parts
from opkit.layers.manifest import Manifest, manifest_from_json

FOLDER = "comm"
TRIES = 2  # of a case that ends its world
DEAD_WORLDS = 3  # in a row without one result, and the rest of their cases is given up
Say = Callable[[str], None]


@dataclass(frozen=True)
class CommPlan:
    """What would be measured: worlds, their number of cases, and a guess at the seconds."""

    worlds: tuple[World, ...]
    cases: int
    seconds: float
    gpus: int


@dataclass(frozen=True)
class CommResult:
    """What became of a run.

    Attributes:
        rows: of everything planned, measured now or before, in the order of the plan.
        tables: written.
        problems: what validation found in them.
        notes: what a reader must know.
        folder: where everything is.
        resumed: rows that an earlier run had measured.
        seconds: wall time.
    """

    rows: tuple[Row, ...]
    tables: tuple[TableFiles, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    folder: Path
    resumed: int
    seconds: float

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows without a value."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        """Whether every case has a value and no row was kept out of its table."""
        return (
            bool(self.rows)
            and not self.failed
            and not any(problem.hard for problem in self.problems)
        )

    def lines(self) -> list[CommLine]:
        """The rows for a reader: latencies and bandwidths."""
        return [line_of(row) for row in self.rows]


def plan_comm(options: CommOptions) -> CommPlan:
    """The plan, without starting anything.

    Raises:
        WrongUsage, BadInput, ToolMissing: see :func:`opkit.collect.comm.plan.make_worlds`.
    """
    present = len(list_gpus()) if options.device == "cuda" else 0
    present = present or max(options.gpus, default=0)  # a plan for another host needs no GPU here
    worlds = make_worlds(options, present)
    cases = sum(len(world.cases) for world in worlds)
    return CommPlan(worlds, cases, estimate_seconds(worlds, options.timing), present)


def run_comm(
    options: CommOptions, say: Say, launcher: Launcher | None = None, host: Host | None = None
) -> CommResult:
    """Measure what is planned and not yet measured, and write the tables.

    Args:
        say: hears what happens.
        launcher, host: stand in for how ranks are started and for what is here.

    Raises:
        WrongUsage, BadInput: see :func:`opkit.collect.comm.plan.make_worlds`; a folder or file that
            cannot be used.
        ToolMissing: torch, a GPU or the engine is not there.
        RunFailed: ranks cannot be started, or outlive SIGKILL.
        KeyboardInterrupt: all ranks have been ended, and what was measured is on the disk.
    """
    began = time.monotonic()
    host = host if host is not None else inspect_host(options)
    worlds = make_worlds(options, len(host.gpus))
    folder = options.out / FOLDER
    run = _Run(options, host, folder, read_parts(folder), say)
    for world in worlds:
        run.measure(world, launcher)
    run.part.close()
    run.parts.refresh()
    rows = tuple(run.parts.rows[key] for world in worlds for key in run.keys(world))
    tables, problems = run.write_tables(worlds)
    return CommResult(
        rows,
        tuple(tables),
        tuple(problems),
        tuple(run.notes),
        folder,
        run.resumed,
        time.monotonic() - began,
    )


@dataclass
class _Todo:
    """A case that has no value yet."""

    key: str
    case: CommCase
    tries: int = 0


@dataclass
class _Run:
    """One run in hand."""

    options: CommOptions
    host: Host
    folder: Path
    parts: Parts
    say: Say
    notes: list[str] = field(default_factory=list)
    resumed: int = 0

    def __post_init__(self) -> None:
        self.part = Part(self.folder)

    def series(self, world: World) -> str:
        """Of the rows of a world."""
        subject = {**self.host.subject(world.implementation), "seed": self.options.seed}
        return series_of(world.implementation, subject, self.options.timing)

    def keys(self, world: World) -> list[str]:
        """Of the cases of a world."""
        series = self.series(world)
        return [case_key(series, case) for case in world.cases]

    def measure(self, world: World, launcher: Launcher | None) -> None:
        """Measure what a world lacks."""
        pairs = list(zip(self.keys(world), world.cases, strict=True))
        todo = [_Todo(key, case) for key, case in pairs if not self.parts.done(key)]
        self.resumed += len(pairs) - len(todo)
        if len(todo) < len(pairs):
            self.say(f"{world.label()}: {len(pairs) - len(todo)} of {len(pairs)} are there already")
        if launcher is None:
            launcher = replace(
                default_launcher(
                    self.options.python,
                    self.folder / "logs" / f"{datetime.now(UTC):%Y%m%dT%H%M%S}",
                    self.options.device,
                    mpirun=world.implementation == "trtllm",
                ),
                case_limit_s=self.options.case_limit_s,
                start_limit_s=self.options.start_limit_s,
            )
        dead = 0
        while todo:
            now = _World(self, replace(world, cases=tuple(one.case for one in todo)), todo)
            broken = run_world(
                now.world, self.options.timing, self.options.seed, launcher, now.heard()
            )
            dead = 0 if now.answered else dead + 1
            todo = [one for one in todo if one.key not in now.answered]
            if broken is not None:
                todo = self._after(world, now.in_hand(broken), broken, todo, dead)

    def _after(
        self, world: World, hit: _Todo | None, broken: Broken, todo: list[_Todo], dead: int
    ) -> list[_Todo]:
        """What is left to do after a world has ended early; cases given up get their row."""
        what = hit.case.label() if hit else f"{world.label()}, starting"
        self.say(f"{what}: {broken.fault}: {broken.error}")
        if dead >= DEAD_WORLDS or (hit is None and dead >= TRIES):
            for one in todo:
                reason = f"given up, {dead} worlds in a row had no result; the last: {broken.error}"
                self.keep(one, fault=broken.fault, error=reason)
            return []
        if hit is None:
            return todo
        hit.tries += 1
        rest = [one for one in todo if one is not hit]
        if hit.tries < TRIES:
            return [*rest, hit]
        self.keep(hit, fault=broken.fault, error=broken.error)
        return rest

    def keep(
        self,
        one: _Todo,
        answer: dict[str, Any] | None = None,
        seconds: float = 0.0,
        fault: Fault | None = None,
        error: str = "",
    ) -> None:
        """Put a row on the disk.

        Raises:
            PartFailed: it does not fit there.
        """
        case, told = one.case, answer or {}
        measured = told.pop("measurement", None)
        gpus = self.host.gpus[: case.ranks]
        row = Row(
            key=one.key,
            group=f"{case.implementation} {case.ranks} ranks",
            table=TABLES[case.implementation].name,
            columns=columns_of(case),
            case={**asdict(case), "total_bytes": case.total_bytes, **told},
            measurement=measurement_from_json(measured, "rank 0") if measured else None,
            fault=fault,
            error=error,
            gpu={
                "name": self.host.device(),
                "uuid": [gpu["uuid"] for gpu in gpus],
                "index": [gpu["index"] for gpu in gpus],
            },
            host=socket.gethostname(),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            seconds=seconds,
            attempts=max(1, one.tries if fault else one.tries + 1),
            build=self._build(case.implementation),
        )
        self.part.append(row)

    def _build(self, implementation: str) -> str:
        """The digest of the circumstances, which ``builds/`` holds."""
        manifest = manifest_of(self.host, implementation)
        digest = build_digest(manifest)
        path = self._build_file(digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{os.getpid()}")
            manifest.write(part)
            part.replace(path)  # whole or not at all: rows depend on it
        return digest

    def _build_file(self, digest: str) -> Path:
        return self.folder / "builds" / f"{digest}.json"

    def _builds(self, rows: Iterable[Row]) -> dict[str, Manifest]:
        """The circumstances of rows, by digest."""
        files = {row.build: self._build_file(row.build) for row in rows}
        return {
            digest: manifest_from_json(path.read_text(), str(path))
            for digest, path in files.items()
        }

    def write_tables(self, worlds: Iterable[World]) -> tuple[list[TableFiles], list[Problem]]:
        """The table of each implementation, of all rows of these circumstances."""
        tables: list[TableFiles] = []
        problems: list[Problem] = []
        by_name: dict[str, set[str]] = {}
        alone = False
        for world in worlds:
            by_name.setdefault(world.implementation, set()).add(self.series(world))
            alone |= not in_tables(world.cases[0])
        if alone:
            self.notes.append(
                "one GPU communicates with nobody: its rows show what a launch costs and are in no "
                "table"
            )
        for name, series in by_name.items():
            found = [row for row in self.parts.rows.values() if _of(row, name)]
            rows = [row for row in found if row.key.rpartition("-")[0] in series]
            if len(rows) < len(found):
                self.notes.append(
                    f"{len(found) - len(rows)} earlier {name} rows of other versions, GPUs, "
                    "variables or timing are kept and are in none of these tables"
                )
            if rows:
                asked, builds = json.dumps(_asked(self)), self._builds(rows)
                written = write_comm_tables(name, rows, self.host, builds, self.options.out, asked)
                tables += written.tables
                problems += written.problems
        return tables, problems


def _of(row: Row, implementation: str) -> bool:
    """Whether a row belongs into the table of an implementation."""
    known = CommCase(**{name: row.case[name] for name in CommCase.__dataclass_fields__})
    return known.implementation == implementation and in_tables(known)


def _asked(run: _Run) -> dict[str, Any]:
    options = asdict(run.options)
    return {name: options[name] for name in ("gpus", "ops", "dtypes", "factor", "device")}


class _World:
    """A world that is being measured: keeps its rows, and says how far it is."""

    def __init__(self, run: _Run, world: World, todo: list[_Todo]) -> None:
        self.run, self.world, self.todo = run, world, todo
        self.answered: set[str] = set()
        self._began = self._case_began = time.monotonic()
        self._shown = ("", "")
        run.say(f"{world.label()}: starting, {len(todo)} case{'s' if len(todo) > 1 else ''}")

    def heard(self) -> Heard:
        """What :func:`run_world` tells."""
        return Heard(self._started, self._answered)

    def in_hand(self, broken: Broken) -> _Todo | None:
        """The case that a world ended at."""
        return None if broken.case is None else self.todo[broken.case]

    def _started(self, number: int) -> None:
        self._case_began = time.monotonic()
        case = self.world.cases[number]
        if (case.op, case.dtype) == self._shown:
            return
        self._shown = (case.op, case.dtype)
        done = len(self.answered)
        each = (time.monotonic() - self._began) / done if done else 0.0
        left = f", about {each * (len(self.todo) - done):.0f} s left" if done else ""
        self.run.say(
            f"{self.world.label()}: {case.op} {case.dtype}, {done} of {len(self.todo)} done{left}"
        )

    def _answered(self, number: int, answer: dict[str, Any] | str) -> None:
        one = self.todo[number]
        self.answered.add(one.key)
        seconds = time.monotonic() - self._case_began
        if isinstance(answer, str):
            self.run.say(f"{one.case.label()}: {Fault.WRONG}: {answer}")
            self.run.keep(one, seconds=seconds, fault=Fault.WRONG, error=answer)
        else:
            self.run.keep(one, answer, seconds)
