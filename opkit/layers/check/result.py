"""What a check has found: one line a rule, and what mock it was. Written and read as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from opkit.errors import BadInput

SCHEMA = "opkit.check/1"
Numbers = dict[str, dict[str, float | int | str | bool | None]]


class Outcome(StrEnum):
    """Of one rule."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "not applicable"
    NOT_RUN = "not run"  # the process ended before


@dataclass(frozen=True)
class Line:
    """One rule of the checklist.

    Attributes:
        check: its name.
        outcome: what came of it.
        detail: with the numbers that decided it.
        cause: of a failure, the likely one.
        fix: what to do about it.
        numbers: by case, or pair of cases.
    """

    check: str
    outcome: Outcome
    detail: str
    cause: str = ""
    fix: str = ""
    numbers: Numbers = field(default_factory=dict)


@dataclass(frozen=True)
class CheckResult:
    """All of it.

    Attributes:
        op, backend: the mock.
        device: ``cuda`` or ``cpu``.
        inputs: how its inputs were made.
        mock: its manifest, as JSON; empty when it could not be built.
        lines: the rules, in the checklist's order.
        seconds: what it took.
        running: the case in hand when the process ended before it was done, else empty.
        complete: whether every case was looked at.
    """

    op: str
    backend: str
    device: str = ""
    inputs: str = "tokens"
    mock: dict[str, Any] = field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    seconds: float = 0.0
    running: str = ""
    complete: bool = False
    schema: str = SCHEMA

    @property
    def passed(self) -> bool:
        """Whether nothing failed and something passed."""
        outcomes = [line.outcome for line in self.lines]
        wrong = {Outcome.FAIL, Outcome.NOT_RUN} & set(outcomes)
        return self.complete and not wrong and Outcome.PASS in outcomes

    def to_json(self) -> str:
        """As JSON; numbers that JSON has no form for are written as text (``nan``, ``inf``)."""
        data = _plain({**asdict(self), "passed": self.passed})
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write it to ``path``, whole or not at all."""
        aside = path.with_name(path.name + ".part")
        aside.write_text(self.to_json())
        aside.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_check_result(path: Path) -> CheckResult:
    """Read a result back.

    Raises:
        BadInput: there is none, or it is of another schema.
    """
    try:
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        data.pop("passed", None)
        lines = tuple(Line(**{**line, "outcome": Outcome(line["outcome"])})
                      for line in data.pop("lines"))  # fmt: skip
        return CheckResult(**data, lines=lines)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path}: no readable result of a check ({error})") from error
