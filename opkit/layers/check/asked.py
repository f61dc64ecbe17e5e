"""What a check is asked to do, as the JSON file that its child process reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from opkit.errors import BadInput
from opkit.layers.plan import INPUTS

SCHEMA = "opkit.check-plan/1"


@dataclass(frozen=True)
class CheckPlan:
    """What to check, and where to say what was found.

    Attributes:
        op, backend: the mock.
        model: folder with the model's ``config.json``.
        result: path of the JSON file to write; its folder must exist.
        engine_args: the serving command's own flags, without the model.
        tp_size: tensor-parallel ranks to simulate; the mock is one of them.
        seed: seed of the prompts.
        inputs, captured: see :class:`opkit.layers.plan.Plan`.
    """

    op: str
    backend: str
    model: str
    result: str
    engine_args: tuple[str, ...] = ()
    tp_size: int = 1
    seed: int = 0
    inputs: str = "tokens"
    captured: str = ""
    schema: str = SCHEMA

    def write(self, path: Path) -> None:
        """Write the plan as JSON to ``path``; :func:`read_check_plan` reads it back."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_check_plan(path: Path) -> CheckPlan:
    """Read a plan back.

    Raises:
        BadInput: it cannot be read, or says what no check can do.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no readable plan of a check ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadInput(f"{path}: not a plan of schema {SCHEMA}")
    unknown = sorted(set(data) - {item.name for item in fields(CheckPlan)})
    if unknown:
        raise BadInput(f"{path}: unknown field {', '.join(unknown)}")
    try:
        plan = CheckPlan(**{**data, "engine_args": tuple(data.get("engine_args", ()))})
    except TypeError as error:
        raise BadInput(f"{path}: not a readable plan of a check ({error})") from error
    if plan.inputs not in INPUTS:
        raise BadInput(f"{path}: inputs must be one of {', '.join(INPUTS)}")
    if not isinstance(plan.tp_size, int) or plan.tp_size < 1:
        raise BadInput(f"{path}: tp_size must be a whole number of at least 1")
    return plan
