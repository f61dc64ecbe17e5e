"""What one side of an alignment says about itself: the sidecar ``<trace>.opkit.json``.

Written by whoever made the trace (the mock process, or the runner of the serving engine), carried
into the SQLite export as table ``OPKIT_MANIFEST``, kept by ``opkit trace slim``. A user's own
export has none; then shapes come from step labels alone and what is unknown is shown as unknown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opkit.errors import BadInput

SCHEMA = "opkit.manifest/1"
SIDECAR_SUFFIX = ".opkit.json"


@dataclass(frozen=True)
class Wave:
    """Requests sent together and waited for.

    ``requests`` prompts of ``prompt`` tokens, ``output`` tokens each.
    """

    requests: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Answer:
    """What the engine answered to one wave of requests.

    Attributes:
        prompt: tokens of each prompt.
        tokens: the output tokens of each request, in the order of the prompts.
    """

    prompt: int
    tokens: tuple[tuple[int, ...], ...]

    def includes(self, batch: int, past: int) -> bool:
        """Whether the wave had a decode step of this batch and this many cached tokens."""
        answered = min(map(len, self.tokens), default=0)
        return batch <= len(self.tokens) and self.prompt <= past < self.prompt + answered

    def to_json(self) -> dict[str, Any]:
        """As plain data, a request's tokens in one text: a line each in a file for people."""
        return {"prompt": self.prompt, "tokens": [" ".join(map(str, ids)) for ids in self.tokens]}


def answer_from_json(data: Mapping[str, Any]) -> Answer:
    """Read an answer back; KeyError, TypeError, ValueError or AttributeError when it is none."""
    tokens = tuple(tuple(int(word) for word in text.split()) for text in data["tokens"])
    return Answer(int(data["prompt"]), tokens)


@dataclass(frozen=True)
class Operand:
    """A sample of one operand of a large kernel; says whether its values are degenerate.

    Attributes:
        name: module path and role, as ``o_proj.weight`` or ``o_proj.input``.
        shape: its dimensions.
        dtype: its element type, as torch writes it without the ``torch.`` prefix.
        distinct: distinct values in the sample over sample size, 0 to 1.
        zeros: share of exact zeros in the sample, 0 to 1.
        equal_rows: share of sampled rows equal to the first sampled row, 0 to 1 (1 row: 0).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    distinct: float
    zeros: float
    equal_rows: float


@dataclass(frozen=True)
class Manifest:
    """See the module's docstring. All fields but ``side`` may be empty."""

    side: str  # "mock" or "e2e"
    op: str = ""
    backend: str = ""
    command: tuple[str, ...] = ()
    created: str = ""  # UTC, ISO 8601
    versions: dict[str, str] = field(default_factory=dict)  # opkit, vllm, torch, cuda, driver, nsys
    model: dict[str, Any] = field(default_factory=dict)  # architecture, layers, heads, digest, …
    # weights, activations, kv_cache, indexer_cache
    dtypes: dict[str, str] = field(default_factory=dict)
    tp_size: int = 1
    engine_args: tuple[str, ...] = ()  # the serving command's own flags, without the model
    layer_source: dict[str, str] = field(default_factory=dict)  # "vllm/…/mla.py" → sha256
    recipe: dict[str, str] = field(default_factory=dict)  # weights, activations, kv_cache, pacing
    operands: tuple[Operand, ...] = ()
    waves: tuple[Wave, ...] = ()
    seed: int = 0  # of the prompts that were sent
    answers: tuple[Answer, ...] = ()  # to the waves, where the engine told its tokens
    notes: tuple[str, ...] = ()  # what the reader of the report should know
    schema: str = SCHEMA

    def write(self, path: Path) -> None:
        """Write the manifest as JSON to ``path``."""
        data = asdict(self) | {"answers": [answer.to_json() for answer in self.answers]}
        path.write_text(json.dumps(data, indent=1) + "\n")


def manifest_from_json(text: str, origin: str) -> Manifest:
    """Read a manifest back.

    Args:
        text: the JSON.
        origin: the file's name, for the error.

    Raises:
        BadInput: the text is not a manifest of this schema.
    """
    try:
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise BadInput(f"{origin}: not a manifest of schema {SCHEMA}")
        data["operands"] = tuple(
            Operand(**{**item, "shape": tuple(item["shape"])}) for item in data.get("operands", ())
        )
        data["waves"] = tuple(Wave(**item) for item in data.get("waves", ()))
        data["answers"] = tuple(map(answer_from_json, data.get("answers", ())))
        data["command"] = tuple(data.get("command", ()))
        data["engine_args"] = tuple(data.get("engine_args", ()))
        data["notes"] = tuple(data.get("notes", ()))
        return Manifest(**data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{origin}: not a readable manifest ({error})") from error


def sidecar_of(report: Path) -> Path:
    """The sidecar's path beside a ``.nsys-rep`` or ``.sqlite`` file."""
    return report.with_name(report.stem + SIDECAR_SUFFIX)
