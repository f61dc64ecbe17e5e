"""Work as plain data: what a worker is told, and the row that it answers with.

A *group* is one build of a mock with the tasks that share it; a *task* is one row to be. A row's
*key* is a digest of all that decides its value, so that a run that is resumed, or two runs on one
folder, know what is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from opkit.collect.measurement import Measurement, Timing, digest_text, measurement_from_json
from opkit.errors import BadInput
from opkit.layers.manifest import Manifest
from opkit.layers.plan import Plan, PlannedCase

SCHEMA = "opkit.row/1"
# How a case is timed, apart from its options. Raised when that changes: rows of two methods never
# stand in one table. 2: eager cases stop by their GPU time.
METHOD = 2


@dataclass(frozen=True)
class Task:
    """One row to be: its content key, and its case."""

    key: str
    planned: PlannedCase[Any]


@dataclass(frozen=True)
class Group:
    """Tasks that share one build of the mock.

    Attributes:
        name: for logs and messages, as ``dsa vllm generation tp 8``.
        plan: what the mock is built from; its cases are those of the tasks, in their order.
        tasks: in the order in which they are to be measured.
        timing: how.
    """

    name: str
    plan: Plan
    tasks: tuple[Task, ...]
    timing: Timing


class Fault(StrEnum):
    """Why a task has no value. Only what a retry in a fresh process could cure is retried."""

    REFUSED = "refused"  # the mock says that this case cannot be
    MEMORY = "out of memory"
    CUDA = "CUDA error"
    CRASH = "worker died"
    TIMEOUT = "timed out"
    WRONG = "wrong result"  # a collective did not compute what it should; never retried
    ERROR = "error"  # any other exception


@dataclass(frozen=True)
class Row:
    """What became of one task.

    Attributes:
        key: the task's.
        group: the group's name.
        table: name of the table it belongs to, as ``dsa_context_module``.
        columns: the table's own columns, but the latency; empty when it failed before the build.
        case: the case, JSON-ready, with its launch mode.
        measurement: None when it failed.
        fault, error: why it failed; empty otherwise.
        gpu: name, uuid and index of the GPU.
        host: of the worker.
        created: UTC, ISO 8601.
        seconds: wall time of the task.
        attempts: times it was tried.
        build: digest of the build's manifest (``build_digest``), which the run's folder holds.
    """

    key: str
    group: str
    table: str
    columns: dict[str, str | int | float]
    case: dict[str, Any]
    measurement: Measurement | None = None
    fault: Fault | None = None
    error: str = ""
    gpu: dict[str, Any] = field(default_factory=dict)
    host: str = ""
    created: str = ""
    seconds: float = 0.0
    attempts: int = 1
    build: str = ""
    schema: str = SCHEMA

    @property
    def ok(self) -> bool:
        """Whether it has a value."""
        return self.measurement is not None

    def to_json(self) -> str:
        """One line of JSON; :func:`row_from_json` reads it back."""
        return json.dumps(asdict(self))


def row_from_json(text: str, origin: str) -> Row:
    """Read a row back.

    Raises:
        BadInput: ``text``, of ``origin``, is no row of this schema.
    """
    try:
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise BadInput(f"{origin}: not a row of schema {SCHEMA}")
        measured = data["measurement"]
        return Row(
            **{
                **data,
                "measurement": measurement_from_json(measured, origin) if measured else None,
                "fault": Fault(data["fault"]) if data["fault"] else None,
            }
        )
    except (json.JSONDecodeError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{origin}: not a readable row ({error})") from error


def series_of(plan: Plan, timing: Timing, subject: Mapping[str, Any]) -> str:
    """The digest of all that the rows of one table share.

    Args:
        plan: any build of the table; its cases, ranks, model folder and pacing do not count.
        timing: how its rows are measured.
        subject: what was admitted: framework version, GPU, dtypes, model, layer source.

    Returns:
        16 hexadecimal digits of a SHA-256.
    """
    return _digest(
        {
            "op": plan.op,
            "backend": plan.backend,
            "engine_args": plan.engine_args,
            "seed": plan.seed,
            "inputs": plan.inputs,
            "caches": plan.caches,
            "timing": asdict(timing),
            "method": METHOD,
            "subject": dict(subject),
        }
    )


def content_key(series: str, tp_size: int, planned: PlannedCase[Any]) -> str:
    """The digest of all that decides a row's value: ``SERIES-CASE``."""
    case = {**asdict(planned.case), "mode": planned.mode, "tp_size": tp_size}
    return f"{series}-{_digest(case)}"


def build_digest(manifest: Manifest) -> str:
    """The digest of what a build says of itself, but when and by which process it was made.

    Returns:
        16 hexadecimal digits of a SHA-256.
    """
    return _digest({**asdict(manifest), "created": "", "command": ()})


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(digest_text(data).encode()).hexdigest()[:16]
