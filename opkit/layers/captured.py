"""The engine's own module inputs, stored by a run that is not timed, and read back by a mock.

A capture is a folder: ``capture.json`` says what it is, ``sequence-P-N.pt`` holds the inputs of
request N of the wave whose prompts have P tokens: for each tensor that the op's modules are called
with, rows in the order of the request's tokens, [tokens, width]. So a mock can replay any step of
that request, with any part of it cached.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from opkit.errors import BadInput
from opkit.layers.op import Case, Phase

SCHEMA = "opkit.capture/1"
# Of one step: request, first token, and number of tokens, in the order of the step's rows.
Rows = Sequence[tuple[int, int, int]]
Key = tuple[int, int]  # tokens of the prompt, number of the request in its wave


def input_name(path: str, argument: str) -> str:
    """How an input is called: the module's path below its layer, and the argument's name."""
    return f"{path}/{argument}"


@dataclass(frozen=True)
class CaptureInfo:
    """What a capture is.

    Attributes:
        op, backend: of the mock that it is for.
        layer: the engine's layer.
        seed: of the prompts.
        model_sha256: digest of the model's ``config.json``.
        versions: of the engine and of opkit.
        command: the serving command.
        created: UTC, ISO 8601.
        lengths: tokens stored of each sequence, by :func:`key_text`.
    """

    op: str
    backend: str
    layer: int
    seed: int
    model_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    lengths: dict[str, int] = field(default_factory=dict)
    schema: str = SCHEMA

    def write(self, folder: Path) -> None:
        """Write ``capture.json``."""
        (folder / "capture.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_info(folder: Path) -> CaptureInfo:
    """What the capture in ``folder`` is.

    Raises:
        BadInput: there is none, or it cannot be read.
    """
    path = folder / "capture.json"
    try:
        data = json.loads(path.read_text())
        if data.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        info = CaptureInfo(**data)
        _sequences(info.lengths)
        return info
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(
            f"{path}: no readable capture ({error})", "`opkit align --inputs captured` makes one"
        ) from error


def _sequences(lengths: Mapping[str, int]) -> dict[Key, int]:
    """Tokens stored, by sequence; ValueError or AttributeError when a name or a number is none."""
    found: dict[Key, int] = {}
    for text, length in lengths.items():
        prompt, _, request = text.partition("-")
        if not isinstance(length, int):
            raise ValueError(f"{length!r} is no number of tokens")
        found[int(prompt), int(request)] = length
    return found


def key_text(key: Key) -> str:
    """How a sequence is called in ``capture.json`` and in its file's name."""
    return f"{key[0]}-{key[1]}"


def in_order(parts: Sequence[tuple[int, Any]]) -> list[Any]:
    """Stored parts of a request as rows in the order of its tokens.

    Args:
        parts: the first token's number, and rows [tokens, width].

    Returns:
        Parts to be joined; of a token that was computed twice, the first; nothing from a gap on, so
        that it is empty when the first token's rows are not there.
    """
    rows: list[Any] = []
    end = 0
    for start, part in sorted(parts, key=lambda item: item[0]):
        if start > end:
            break
        rows.append(part[end - start :])
        end = max(end, start + part.shape[0])
    return rows


def require_capture_of(folder: Path, op: str, backend: str) -> CaptureInfo:
    """What the capture in ``folder`` is, which must be of an op on a backend.

    Raises:
        BadInput: there is none, it is another's, or it holds nothing.
    """
    info = read_info(folder)
    if (info.op, info.backend) != (op, backend):
        raise BadInput(
            f"{folder}: captured for {info.op} on {info.backend}, not for {op} on {backend}"
        )
    if not info.lengths:
        raise BadInput(f"{folder}: holds no inputs")
    return info


class Captured:
    """The stored inputs of one op in one layer.

    Args:
        folder: where they are.
        op, backend: what they must be of.

    Raises:
        BadInput: the folder holds none, or another op's.
    """

    def __init__(self, folder: Path, op: str, backend: str) -> None:
        self.info = require_capture_of(folder, op, backend)
        self._folder = folder
        self._lengths = _sequences(self.info.lengths)
        self._loaded: dict[Key, dict[str, Any]] = {}
        self._prompt = next(iter(self._lengths))[0]

    def require(self, layer: int, model_sha256: str) -> None:
        """Refuse the inputs of another layer or model; a capture may not know its model.

        Raises:
            BadInput: they are.
        """
        if self.info.layer != layer:
            raise BadInput(
                f"{self._folder}: captured from layer {self.info.layer}, the mock stands for layer "
                f"{layer}",
                f"give --layer {self.info.layer}",
            )
        if self.info.model_sha256 not in ("", model_sha256):
            raise BadInput(f"{self._folder}: captured from a model with another config.json")

    def select(self, case: Case) -> None:
        """Take the wave that the case's step belongs to.

        Raises:
            BadInput: the engine's run had no step of that batch and length.
        """
        wanted = [
            prompt
            for prompt in sorted({prompt for prompt, _ in self._lengths})
            if all(self._fits(case, prompt, request) for request in range(case.batch))
        ]
        if not wanted:
            raise BadInput(
                f"{self._folder}: no captured step of {case.phase} {case.label()}",
                "capture with the --requests that are aligned",
            )
        # The longest prompt that had been processed by then, else the first that is long enough.
        self._prompt = wanted[-1] if case.phase is Phase.GENERATION else wanted[0]

    def _fits(self, case: Case, prompt: int, request: int) -> bool:
        length = self._lengths.get((prompt, request), 0)
        if case.phase is Phase.CONTEXT:
            return case.past + case.tokens <= min(prompt, length)
        return prompt <= case.past < length

    def has(self, name: str) -> bool:
        """Whether the input called ``name`` was stored."""
        return name in self._sequence(next(iter(self._lengths)))

    def rows(self, name: str, rows: Rows) -> Any:
        """The stored rows of a step of the selected wave, [tokens, width], on the CPU.

        Raises:
            BadInput: the engine's run had no such request, or not so many tokens of it.
        """
        torch = importlib.import_module("torch")
        parts = []
        for request, start, count in rows:
            key = (self._prompt, request)
            if self._lengths.get(key, 0) < start + count:
                raise BadInput(
                    f"{self._folder}: sequence {key_text(key)} has "
                    f"{self._lengths.get(key, 0):,} captured tokens, {start + count:,} are needed"
                )
            parts.append(self._sequence(key)[name][start : start + count])
        return torch.cat(parts)

    def _sequence(self, key: Key) -> dict[str, Any]:
        if key not in self._loaded:
            torch = importlib.import_module("torch")
            path = self._folder / f"sequence-{key_text(key)}.pt"
            try:
                self._loaded[key] = torch.load(path, map_location="cpu", weights_only=True)
            except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise BadInput(f"{path}: cannot be read ({reason})") from error
        return self._loaded[key]
