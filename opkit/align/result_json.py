"""An alignment as JSON, and back: the versioned form for scripts, the ledger and reports."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from opkit.align.result import (
    AlignResult,
    CaseMatch,
    CheckResult,
    KernelPair,
    KernelShare,
    KernelStat,
    Level,
    Method,
    Outcome,
    PhaseResult,
    SideSummary,
)
from opkit.errors import BadInput, what_is_wrong
from opkit.layers.op import Case, LaunchMode, Phase

SCHEMA = "opkit.align/1"
# How plain fields of results are annotated, and what they may hold.
_PLAIN: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,),
}  # fmt: skip
# What of the provenance is an object, a list of objects, or a list of texts, where it is there.
_OBJECTS = (
    "versions", "model", "dtypes", "policy", "layer_source", "recipe", "commands", "region",
)  # fmt: skip
_LISTS = {"files": dict, "waves": dict, "operands": dict, "engine_args": str,
          "nsys_warnings": str, "notes": str}  # fmt: skip


def align_json(result: AlignResult) -> dict[str, Any]:
    """The result as JSON-ready data; times in ns, shares and ratios as fractions of 1.

    Kernel rows carry ``position``, their place in launch order within their case, from 1.
    """
    return {
        "schema": SCHEMA,
        "op": result.op,
        "backend": result.backend,
        "verdict": str(result.verdict),
        "phases": {str(phase.phase): _phase(phase) for phase in result.phases},
        "provenance": result.provenance,
        "notes": list(result.notes),
    }


def align_from_json(data: dict[str, Any], origin: str = "report") -> AlignResult:
    """Read back what :func:`align_json` made.

    Args:
        data: the JSON.
        origin: where it comes from, for the error.

    Raises:
        BadInput: the data is not an alignment of this schema.
    """
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise BadInput(f"{origin}: not an alignment report of schema {SCHEMA}")
    try:
        found = AlignResult(
            op=data["op"],
            backend=data["backend"],
            verdict=Outcome(data["verdict"]),
            phases=tuple(_phase_from(name, phase) for name, phase in data["phases"].items()),
            provenance=dict(data["provenance"]),
            notes=tuple(data["notes"]),
        )
        _check_plain(found)
        _check_provenance(found.provenance)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{origin}: a damaged alignment report ({what_is_wrong(error)})") from error
    return found


def _check_plain(made: Any) -> None:
    """ValueError where, anywhere in ``made``, a number is none or not finite, or a text no text."""
    for field in fields(made):
        value, kind = getattr(made, field.name), str(field.type)
        if value is None and kind.endswith(" | None"):
            continue
        items = value if isinstance(value, tuple) else (value,)
        allowed = _PLAIN.get(kind.removeprefix("tuple[").split(" | ")[0].split(",")[0])
        for item in items:
            if is_dataclass(item):
                _check_plain(item)
            elif allowed and not (isinstance(item, allowed) and _finite(item)):
                raise ValueError(f"{field.name} is {json.dumps(item, default=str)}")


def _check_provenance(known: dict[str, Any]) -> None:
    """ValueError where a part of the provenance has another shape than reports show."""
    wrong = [name for name in _OBJECTS if not isinstance(known.get(name) or {}, dict)]
    for name, kind in _LISTS.items():
        items = known.get(name) or []
        if not isinstance(items, list | tuple) or not all(isinstance(item, kind) for item in items):
            wrong.append(name)
    if wrong:
        raise ValueError(f"provenance: {', '.join(wrong)}")


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _phase(phase: PhaseResult) -> dict[str, Any]:
    names = case_names(phase.cases)
    return {
        "verdict": str(phase.verdict),
        "method": str(phase.method) if phase.method else None,
        "attributed": phase.attributed,
        # The weakest case speaks for the phase.
        "explained": min((case.explained for case in phase.cases), default=None),
        "checks": [_check(check) for check in phase.checks],
        "cases": [_case(name, case) for name, case in zip(names, phase.cases, strict=True)],
        "kernels": [
            _pair(name, position, pair)
            for name, case in zip(names, phase.cases, strict=True)
            for position, pair in enumerate(case.pairs, 1)
        ],
        "notes": list(phase.notes),
    }


def case_names(cases: tuple[CaseMatch, ...]) -> list[str]:
    """A name for each case: its shape, numbered where two cases share one."""
    seen: Counter[str] = Counter()
    names = []
    for case in cases:
        label = case.mock.case.label()
        seen[label] += 1
        names.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return names


def _check(check: CheckResult) -> dict[str, Any]:
    return {
        "check": check.check,
        "outcome": str(check.outcome),
        "detail": check.detail,
        "kernels": list(check.kernels),
        "cause": check.cause,
        "next_step": check.next_step,
    }


def _case(name: str, case: CaseMatch) -> dict[str, Any]:
    return {
        "case": name,
        "mock": _side(case.mock),
        "e2e": _side(case.e2e),
        "method": str(case.method),
        "attributed": case.attributed,
        "explained": case.explained,
        "steps": case.steps,
        "unattributed": [asdict(share) for share in case.unattributed],
        "outside": [asdict(share) for share in case.outside],
    }


def _side(side: SideSummary) -> dict[str, Any]:
    data = asdict(side)
    data["case"] |= {"phase": str(side.case.phase)}
    data["mode"] = str(side.mode) if side.mode else None
    return data


def _pair(name: str, position: int, pair: KernelPair) -> dict[str, Any]:
    return {
        "case": name,
        "position": position,
        "mock": _kernel(pair.mock),
        "e2e": _kernel(pair.e2e),
        "level": str(pair.level),
        "key": pair.key,
        "glue": pair.glue,
        "share": pair.share,
        "ratio": pair.ratio,
    }


def _kernel(kernel: KernelStat | None) -> dict[str, Any] | None:
    if kernel is None:
        return None
    data = asdict(kernel)
    for dimensions in ("grid", "block"):
        data[dimensions] = list(data[dimensions]) if data[dimensions] else None
    return data


def _phase_from(name: str, data: dict[str, Any]) -> PhaseResult:
    return PhaseResult(
        phase=Phase(name),
        verdict=Outcome(data["verdict"]),
        method=Method(data["method"]) if data["method"] else None,
        attributed=data["attributed"],
        cases=tuple(_case_from(case, data["kernels"]) for case in data["cases"]),
        checks=tuple(_check_from(check) for check in data["checks"]),
        notes=tuple(data["notes"]),
    )


def _check_from(data: dict[str, Any]) -> CheckResult:
    return CheckResult(
        **data | {"outcome": Outcome(data["outcome"]), "kernels": tuple(data["kernels"])}
    )


def _case_from(data: dict[str, Any], kernels: list[dict[str, Any]]) -> CaseMatch:
    return CaseMatch(
        mock=_side_from(data["mock"]),
        e2e=_side_from(data["e2e"]),
        method=Method(data["method"]),
        attributed=data["attributed"],
        explained=data["explained"],
        pairs=tuple(_pair_from(row) for row in kernels if row["case"] == data["case"]),
        # Absent in results of an older opkit.
        steps=data.get("steps", 0),
        unattributed=tuple(KernelShare(**share) for share in data.get("unattributed", ())),
        outside=tuple(KernelShare(**share) for share in data.get("outside", ())),
    )


def _side_from(data: dict[str, Any]) -> SideSummary:
    case = data["case"]
    return SideSummary(
        **data
        | {
            "case": Case(**case | {"phase": Phase(case["phase"])}),
            "mode": LaunchMode(data["mode"]) if data["mode"] else None,
            "samples_ns": tuple(data.get("samples_ns", ())),
        }
    )


def _pair_from(data: dict[str, Any]) -> KernelPair:
    return KernelPair(
        mock=_kernel_from(data["mock"]),
        e2e=_kernel_from(data["e2e"]),
        level=Level(data["level"]),
        key=data["key"],
        glue=data["glue"],
        share=data["share"],
    )


def _kernel_from(data: dict[str, Any] | None) -> KernelStat | None:
    if data is None:
        return None
    dimensions = {name: _three(data[name]) for name in ("grid", "block")}
    return KernelStat(**data | dimensions)


def _three(sizes: list[int] | None) -> tuple[int, int, int] | None:
    """Launch dimensions; ValueError when they are not three."""
    if sizes is None:
        return None
    if len(sizes) != 3:
        raise ValueError(f"launch dimensions {sizes} are not three")
    x, y, z = sizes
    return x, y, z
