"""What differs in the provenance of two alignments, and what makes them hard to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opkit.align.comparison import Fact
from opkit.align.result import AlignResult

# Differ between any two runs, or follow from what is compared anyway.
LEFT_OUT = frozenset(
    ("created", "op", "backend", "opkit", "files", "operands", "notes", "nsys_warnings",
     "policy_digest", "commands", "engine_args", "waves")
)  # fmt: skip
TITLES = {"layer_source": "layer source", "tp_size": "tp", "gpu": "GPU", "recipe": "inputs"}


def facts(a: AlignResult, b: AlignResult) -> tuple[Fact, ...]:
    """Values that differ, one a row; of lists (flags, requests) what only one side has."""
    left, right = (_flat(result) for result in (a, b))
    keys = dict.fromkeys([*left, *right])
    if _digest(a) and _digest(a) == _digest(b):  # opkit may have told more or less of one model
        keys = dict.fromkeys(key for key in keys if key[0] != "model")
    found = [
        Fact(*key, left.get(key, ""), right.get(key, ""))
        for key in keys
        if left.get(key, "") != right.get(key, "")
    ]
    for name, (old, new) in {
        "flags": (_flags(a), _flags(b)),
        "requests": (_requests(a), _requests(b)),
    }.items():
        gone, more = ([x for x in one if x not in other] for one, other in ((old, new), (new, old)))
        if gone or more:
            found.append(Fact("run", name, " ".join(gone), " ".join(more)))
    return tuple(found)


def warnings(a: AlignResult, b: AlignResult, cases: int) -> tuple[str, ...]:
    """Sentences: why a difference may say nothing about the framework.

    Args:
        a, b: the alignments.
        cases: shapes that both ran.
    """
    subjects = {
        "backends": (a.backend, b.backend),
        "GPUs": (a.provenance.get("gpu"), b.provenance.get("gpu")),
        "models": (_model(a), _model(b)),
        "tensor parallel sizes": (a.provenance.get("tp_size"), b.provenance.get("tp_size")),
        "dtypes": (_pairs(a.provenance.get("dtypes")), _pairs(b.provenance.get("dtypes"))),
    }
    said = [
        f"different {what}: {left or 'unknown'} and {right or 'unknown'}"
        for what, (left, right) in subjects.items()
        if left != right
    ]
    if not cases:
        said.append("no shape was run by both, so no kernel is compared")
    return tuple(said)


def _flat(result: AlignResult) -> dict[tuple[str, str], str]:
    return dict(
        item
        for key, value in result.provenance.items()
        if key not in LEFT_OUT
        for item in _values(TITLES.get(key, key), value)
    )


def _values(group: str, value: Any) -> Iterator[tuple[tuple[str, str], str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if (group, name) != ("versions", "gpu"):  # the GPU has a line of its own
                yield (group, str(name)), _text(inner)
    else:
        yield (group, ""), _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _flags(result: AlignResult) -> list[str]:
    """The serving command, or the mock's arguments where it is not known, flag by flag."""
    command = (result.provenance.get("commands") or {}).get("e2e")
    words: Sequence[str] = command or result.provenance.get("engine_args") or ()
    made: list[str] = []
    for word in words:
        if made and not word.startswith("-") and made[-1].startswith("-"):
            made[-1] += f" {word}"
        else:
            made.append(word)
    return made


def _requests(result: AlignResult) -> list[str]:
    return [
        f"{wave.get('requests')}x{wave.get('prompt')}+{wave.get('output')}"
        for wave in result.provenance.get("waves") or ()
    ]


def _model(result: AlignResult) -> str:
    """Architecture and what was changed of it; the digest, where two models of a name differ."""
    model = result.provenance.get("model") or {}
    words = (str(model.get("architecture") or ""), _digest(result)[:8])
    return " ".join(word for word in words if word)


def _digest(result: AlignResult) -> str:
    return str((result.provenance.get("model") or {}).get("config_sha256") or "")


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted((values or {}).items()))
