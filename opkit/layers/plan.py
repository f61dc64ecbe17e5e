"""The plan: everything the mock process (``drive``) is told, as one JSON file.

``align`` writes it beside the trace it is for, ``drive`` reads it, so a mock can be run again by
hand.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from opkit.errors import BadInput
from opkit.layers.manifest import Answer, answer_from_json
from opkit.layers.op import AnyCase, GemmCase, LaunchMode, MoeCase, Phase, case_from_json

SCHEMA = "opkit.plan/1"
L2_STATES = ("swept", "left")
LIMITS = ("server", "cases")
CACHES = ("prefilled", "pooled")
# tokens: random token ids through the engine's own embedding and norm. normal: values drawn from a
# normal distribution. captured: the engine's own module inputs. zeros, rows: degenerate on purpose,
# to show what they do; never for a table.
INPUTS = ("tokens", "normal", "captured", "zeros", "rows")
DEGENERATE_INPUTS = ("zeros", "rows")


CaseT = TypeVar("CaseT", bound=AnyCase)


@dataclass(frozen=True)
class PlannedCase(Generic[CaseT]):
    """One case and the launch mode it is to be run in."""

    case: CaseT
    mode: LaunchMode


@dataclass(frozen=True)
class Plan:
    """What to run, as which server, and where to say so.

    Attributes:
        op: name of the op.
        backend: the serving engine whose classes build the mock.
        model: folder with the model's ``config.json``.
        cases: the cases, in the order they are run.
        manifest: path of the manifest to write; its folder must exist.
        engine_args: the serving command's own flags, without the model.
        tp_size: tensor-parallel ranks of the server; the mock is one of them.
        seed: seed of the prompts.
        warmup: iterations of a case before the measured ones.
        iterations: measured iterations of a case, each in an NVTX range.
        context_pause_ms: pause after a context iteration (bursts, as at low load), milliseconds.
        generation_pause_ms: pause after a generation iteration, milliseconds.
        strict: take the module out of the engine's own decoder layer.
        inputs: how activations are made, one of ``INPUTS``.
        captured: folder of the captured inputs, for ``inputs`` = ``captured``.
        layer: the engine's layer that the mock stands for: whose weights and captured inputs are
            taken where they differ between layers.
        answers: what the engine answered to its waves, where it told: the tokens of decode steps.
        l2: ``swept`` reads twice the L2 cache's size before each iteration; ``left`` does not.
        limits: ``server`` keeps the server's limits on tokens, requests and lengths; ``cases``
            raises them to what the cases need, and captures a graph for each of their batches.
        caches: ``prefilled`` runs each request's past through the module; ``pooled`` does so for
            one long request at start-up and repeats its blocks over the whole cache.
    """

    op: str
    backend: str
    model: str
    cases: tuple[PlannedCase[Any], ...]
    manifest: str
    engine_args: tuple[str, ...] = ()
    tp_size: int = 1
    seed: int = 0
    warmup: int = 5
    iterations: int = 20
    context_pause_ms: float = 50.0
    generation_pause_ms: float = 0.0
    strict: bool = False
    inputs: str = "tokens"
    captured: str = ""
    layer: int = 0
    answers: tuple[Answer, ...] = ()
    l2: str = "swept"
    limits: str = "server"
    caches: str = "prefilled"
    schema: str = SCHEMA

    def pause_s(self, phase: Phase) -> float:
        """Seconds to wait after an iteration of ``phase``."""
        context = phase is Phase.CONTEXT
        return (self.context_pause_ms if context else self.generation_pause_ms) / 1000

    def to_json(self) -> str:
        """The plan as JSON; :func:`plan_from_json` reads it back."""
        data = asdict(self)
        data["cases"] = [{**asdict(item.case), "mode": item.mode} for item in self.cases]
        data["answers"] = [answer.to_json() for answer in self.answers]
        return json.dumps(data, indent=1) + "\n"

    def write(self, path: Path) -> None:
        """Write the plan as JSON to ``path``."""
        path.write_text(self.to_json())


def plan_from_json(text: str, origin: str) -> Plan:
    """Read a plan and check that it can mean something.

    Args:
        text: the JSON.
        origin: the file's name, for the error.

    Raises:
        BadInput: not JSON, an unknown or missing field, a wrong type, or an impossible case.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{origin}: not JSON ({error})") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadInput(f"{origin}: not a plan of schema {SCHEMA}")
    unknown = sorted(set(data) - {item.name for item in fields(Plan)})
    if unknown:
        raise BadInput(f"{origin}: unknown field {', '.join(unknown)}")
    try:
        data["cases"] = tuple(_case(item) for item in data["cases"])
        data["engine_args"] = tuple(data.get("engine_args", ()))
        data["answers"] = tuple(map(answer_from_json, data.get("answers", ())))
        plan = Plan(**data)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadInput(f"{origin}: not a readable plan ({error})") from error
    _check(plan, origin)
    return plan


def read_plan(path: Path) -> Plan:
    """Read the plan in ``path``.

    Raises:
        BadInput: the file cannot be read, or see :func:`plan_from_json`.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    return plan_from_json(text, str(path))


def _case(item: dict[str, Any]) -> PlannedCase[Any]:
    """One case from its JSON object; KeyError, TypeError or ValueError when it is none."""
    return PlannedCase(case_from_json(item), LaunchMode(item["mode"]))


def _check(plan: Plan, origin: str) -> None:
    """Raise BadInput, naming the field, unless every value is of its type and in its range."""
    texts = (
        plan.op, plan.backend, plan.model, plan.manifest, plan.l2, plan.captured, *plan.engine_args
    )  # fmt: skip
    if not all(isinstance(item, str) for item in texts):
        raise BadInput(
            f"{origin}: op, backend, model, manifest, captured and engine_args must be text"
        )
    wholes = (("tp_size", 1), ("seed", 0), ("warmup", 0), ("iterations", 1), ("layer", 0))
    for name, least in wholes:
        if not _whole(getattr(plan, name), least):
            raise BadInput(f"{origin}: {name} must be a whole number of at least {least}")
    for name in ("context_pause_ms", "generation_pause_ms"):
        value = getattr(plan, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e5:
            raise BadInput(f"{origin}: {name} must be milliseconds from 0 to 100,000")
    if not isinstance(plan.strict, bool):
        raise BadInput(f"{origin}: strict must be true or false")
    if plan.inputs not in INPUTS:
        raise BadInput(f"{origin}: inputs must be one of {', '.join(INPUTS)}")
    if (plan.inputs == "captured") != bool(plan.captured):
        raise BadInput(
            f"{origin}: captured inputs need the folder that holds them, and no other do"
        )
    for name, known in (("l2", L2_STATES), ("limits", LIMITS), ("caches", CACHES)):
        if getattr(plan, name) not in known:
            raise BadInput(f"{origin}: {name} must be one of {', '.join(known)}")
    if not plan.cases:
        raise BadInput(f"{origin}: no cases")
    for item in plan.cases:
        _check_case(item.case, origin)


def _check_case(case: AnyCase, origin: str) -> None:
    """Raise BadInput when no engine step can have this shape."""
    if isinstance(case, GemmCase):
        if not all(_whole(value, 1) for value in (case.m, case.n, case.k)):
            raise BadInput(f"{origin}: m, n and k must be at least 1")
        return
    if isinstance(case, MoeCase):
        if not _whole(case.tokens, 1):
            raise BadInput(f"{origin}: tokens must be at least 1")
        parse_routing(case.routing, origin)
        return
    if not (_whole(case.batch, 1) and _whole(case.tokens, 1) and _whole(case.past, 0)):
        raise BadInput(f"{origin}: batch and tokens must be at least 1, past at least 0")
    if case.phase is Phase.GENERATION and (case.tokens != 1 or case.past < 1):
        raise BadInput(
            f"{origin}: a generation case has one new token per request and a past of at least 1, "
            f"not {case.label()}"
        )


_POWER_LAW = re.compile(r"power_law_(\d+(?:\.\d+)?)")


def parse_routing(text: str, origin: str = "routing") -> float:
    """The exponent of a routing rule; 0 for ``balanced``.

    Raises:
        BadInput: neither ``balanced`` nor ``power_law_A`` with a number A above 0.
    """
    if text == "balanced":
        return 0.0
    found = _POWER_LAW.fullmatch(text) if isinstance(text, str) else None
    if found is None or float(found[1]) <= 0:
        raise BadInput(f"{origin}: routing is balanced or power_law_A (A > 0), not {text!r}")
    return float(found[1])


def _whole(value: object, least: int) -> bool:
    """Whether ``value`` is an integer (not a bool) of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
