"""Options as they were given, by command line or by a file of several models, made whole."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opkit.bench.plan import BenchOptions, parse_counts, parse_pairs
from opkit.errors import BadInput, WrongUsage

# Names on the command line and in a file (dashes as underscores), and in BenchOptions.
NAMES = {
    "name": "name",
    "backend": "backend",
    "model": "model",
    "engine_dir": "engine_dir",
    "url": "url",
    "served_model": "served_model",
    "n_prompt": "n_prompt",
    "n_gen": "n_gen",
    "prompt_gen": "pairs",
    "batch": "n_batch",
    "repetitions": "repetitions",
    "warmup": "warmup",
    "delay": "delay_s",
    "power_seconds": "power_s",
    "sample_ms": "sample_ms",
    "cool_to": "cool_to_c",
    "cool_limit": "cool_limit_s",
    "max_input_length": "max_input_length",
    "clip": "clip",
    "seed": "seed",
    "vocab_size": "vocab_size",
    "tokenizer_dir": "tokenizer_dir",
    "python": "python",
    "engine_args": "engine_args",
    "start_limit": "start_limit_s",
    "limit": "limit_s",
    "log_level": "log_level",
}
_TEXT = ("name", "backend", "model", "url", "served_model", "python", "log_level")
_WHOLE = {"repetitions": 1, "warmup": 0, "sample_ms": 1, "max_input_length": 0, "seed": 0,
          "vocab_size": 0}  # fmt: skip
_REAL = ("delay", "power_seconds", "cool_to", "cool_limit", "start_limit", "limit")
_MODELS = "models"


def make_options(given: Mapping[str, Any]) -> BenchOptions:
    """Options from values as a command line or a file has them; what is absent is the default.

    Raises:
        WrongUsage: a value that makes no sense, or options that do not go together.
    """
    values = {NAMES[key]: _value(key, value) for key, value in given.items() if value is not None}
    if "backend" not in values:
        raise WrongUsage("which backend? --backend vllm, trtllm or openai-url")
    return BenchOptions(**values)


def read_scenario(path: Path, given: Mapping[str, Any]) -> list[BenchOptions]:
    """The models of a scenario file, in TOML or YAML.

    A list ``models`` holds one table for each; what stands beside the list holds for all of them,
    and what was ``given`` on the command line for all that the file does not say.

    Raises:
        BadInput: the file cannot be read, or holds something that is no option.
        WrongUsage: as :func:`make_options`.
    """
    content = _load(path)
    models = content.pop(_MODELS, None)
    if not isinstance(models, list) or not models:
        raise BadInput(
            f"{path}: no list of models",
            "each is a table: [[models]] in TOML, a list item below models: in YAML",
        )
    for table in (content, *models):
        _check(table, path)
    return [make_options({**given, **content, **each}) for each in models]


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    yaml: Any = importlib.import_module("yaml")
    try:
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        raise BadInput(f"{path}: not {kind} ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: not a table of options")
    return content


def _check(table: Any, path: Path) -> None:
    if not isinstance(table, dict):
        raise BadInput(f"{path}: a model is a table of options, not {table!r}")
    for key in table:
        if key not in NAMES:
            near = difflib.get_close_matches(str(key), NAMES, n=1)
            raise BadInput(
                f"{path}: no option {key!r}" + (f"; {near[0]} is one" if near else ""),
                f"options: {', '.join(NAMES)}",
            )


def _value(key: str, value: Any) -> Any:
    """A value as BenchOptions has it."""
    option = "--" + key.replace("_", "-")
    if key in ("n_prompt", "n_gen", "batch"):
        found = parse_counts(_words(value), option)
        if key == "batch" and 0 in found:
            raise WrongUsage("--batch 0: one request at least")
        return found
    if key == "prompt_gen":
        pairs = value if isinstance(value, (list, tuple)) else [value]
        return parse_pairs(p if isinstance(p, str) else ",".join(_words(p)) for p in pairs)
    if key == "engine_args":
        return dict(value) if isinstance(value, Mapping) else parse_engine_args(_words(value))
    if key in ("engine_dir", "tokenizer_dir"):
        return Path(str(value))
    if key in _TEXT:
        return str(value)
    if key == "clip":
        if not isinstance(value, bool):
            raise WrongUsage(f"{option} {value!r}: true or false")
        return value
    return _number(key, value, option)


def _number(key: str, value: Any, option: str) -> int | float:
    wanted = float if key in _REAL else int
    right = isinstance(value, (int, wanted)) and not isinstance(value, bool)
    right = right and math.isfinite(value)
    if right and key in ("limit", "start_limit") and value <= 0:
        raise WrongUsage(f"{option} {value!r}: give seconds, more than 0")
    if not right or (key != "cool_to" and value < _WHOLE.get(key, 0)):
        least = "" if key == "cool_to" else f", {_WHOLE.get(key, 0)} or more"
        raise WrongUsage(f"{option} {value!r}: give a number{least}")
    return wanted(value)


def parse_engine_args(words: Iterable[str]) -> dict[str, Any]:
    """Keywords from ``name=value``; a value is JSON where it can be read so, else text.

    Raises:
        WrongUsage: no ``=`` in it.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise WrongUsage(
                f"--engine-args {word}: give name=value",
                "e.g. --engine-args load_format=dummy max_model_len=4096 enforce_eager=true",
            )
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _words(value: Any) -> list[str]:
    return [str(each) for each in value] if isinstance(value, (list, tuple)) else [str(value)]
