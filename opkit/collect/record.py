"""What a collection was asked for and what became of it: ``run.json`` in its folder.

``verify`` measures again by it, ``install`` finds the tables by it, ``status`` shows it with its
waiver.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from opkit.collect.measurement import Timing
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode

SCHEMA = "opkit.collection/1"
NAME = "run.json"
FOLDER = "collect"


@dataclass(frozen=True)
class Record:
    """See the module's docstring.

    Attributes:
        op, backend, model, engine_args, seed: as in ``groups.Subject``.
        modes: launch mode of each phase.
        admitted: what each phase's rows stand for.
        series: what the keys of its rows begin with, one for each phase.
        timing: how rows are measured.
        latency: which time the tables hold: ``auto``, ``elapsed`` or ``gpu``.
        verdicts: ids of the verdicts that admitted it.
        waiver: the user's reason to collect without, or against, a verdict.
        differences: what that reason overrode.
        created, updated: UTC, ISO 8601.
        planned: rows of the last run's sweep.
        rows: rows in each table.
        failed: quarantined cases by cause.
        python: interpreter of the workers.
    """

    op: str
    backend: str
    model: str
    engine_args: tuple[str, ...]
    modes: dict[str, LaunchMode]
    seed: int
    admitted: dict[str, dict[str, Any]]
    timing: Timing
    latency: str
    series: tuple[str, ...] = ()
    verdicts: str = ""
    waiver: str = ""
    differences: tuple[str, ...] = ()
    created: str = ""
    updated: str = ""
    planned: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    python: str = ""
    schema: str = SCHEMA

    def with_other_phases(self, before: Record) -> Record:
        """This record, and what ``before`` tells of phases that this run did not collect.

        Nothing is kept of a record whose rows were made otherwise.
        """
        same = ("op", "backend", "model", "engine_args", "seed", "timing", "latency", "waiver")
        others = [phase for phase in before.admitted if phase not in self.admitted]
        if not others or any(getattr(self, name) != getattr(before, name) for name in same):
            return self
        series = dict(zip(before.admitted, before.series, strict=True))
        ids = {*self.verdicts.split(), *before.verdicts.split()}
        return replace(
            self,
            admitted=self.admitted | {phase: before.admitted[phase] for phase in others},
            modes=self.modes | {phase: before.modes[phase] for phase in others},
            series=(*self.series, *(series[phase] for phase in others)),
            verdicts=" ".join(sorted(ids)),
            rows=before.rows | self.rows,
        )

    def write(self, folder: Path) -> None:
        """Write it into ``folder``, in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{NAME}.{os.getpid()}"
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(folder / NAME)


def folder_of(out: Path, op: str, backend: str) -> Path:
    """Where a collection lives."""
    return out / FOLDER / f"{op}-{backend}"


def read_record(folder: Path) -> Record:
    """Read the record of a collection.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = folder / NAME
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise BadInput(f"{path}: not a collection of schema {SCHEMA}")
        return Record(
            **{
                **data,
                "engine_args": tuple(data["engine_args"]),
                "modes": {phase: LaunchMode(mode) for phase, mode in data["modes"].items()},
                "timing": Timing(**data["timing"]),
                "differences": tuple(data["differences"]),
                "series": tuple(data["series"]),
            }
        )
    except FileNotFoundError as error:
        raise BadInput(
            f"{folder}: nothing has been collected there", "opkit collect OP makes it"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: not a readable collection ({error})") from error


def find_records(out: Path, op: str | None = None) -> list[tuple[Path, Record]]:
    """All collections below the output folder, newest first."""
    found = [(path.parent, read_record(path.parent)) for path in (out / FOLDER).glob(f"*/{NAME}")]
    wanted = [(folder, record) for folder, record in found if op in (None, record.op)]
    return sorted(wanted, key=lambda item: item[1].updated, reverse=True)


def the_record(out: Path, op: str, backend: str) -> tuple[Path, Record]:
    """The newest collection of an op.

    Raises:
        BadInput: there is none.
    """
    found = [item for item in find_records(out, op) if backend in ("", item[1].backend)]
    if not found:
        raise BadInput(
            f"no {op} has been collected in {out}", f"collect it first: opkit collect {op}"
        )
    return found[0]
