"""A server's command line, read: model, address, tensor parallelism, the engine's own flags."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from opkit.align.profile.engines import Engine, engine_named, find_head
from opkit.errors import BadInput

_SHELL_WORDS = {"&&", "||", "|", ";", "&", ">", ">>", "2>", "2>&1", "<"}


@dataclass(frozen=True)
class ServerCommand:
    """``--e2e-cmd`` as understood.

    Attributes:
        argv: the program and its arguments as given.
        env: assignments that stood before it.
        engine: the serving engine, or None for any other program.
        engine_args: the engine's own flags: what follows the model, without those of its HTTP
            server. A mock builds the same engine from them.
        model: the model's folder or name as given; empty when not found.
        url: where the server will listen; empty when it is no server.
        tp_size: tensor parallel size.
        served_name: the model's name in requests, when a flag gives it.
        api_key: sent with the requests when the server asks for one.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    engine: Engine | None = None
    engine_args: tuple[str, ...] = ()
    model: str = ""
    url: str = ""
    tp_size: int = 1
    served_name: str = ""
    api_key: str = ""
    recognised: bool = False  # found in the command itself, not merely named by the user

    def shown(self) -> tuple[str, ...]:
        """The command without its secret, for a manifest."""
        if not self.api_key:
            return self.argv
        return tuple(word.replace(self.api_key, "***") for word in self.argv)


def read_command(text: str, engine_name: str = "", url: str = "") -> ServerCommand:
    """Understand ``--e2e-cmd``.

    Args:
        text: the command, in a shell's quoting; no pipes or lists.
        engine_name: the engine to assume when the command hides it (a wrapper script).
        url: where the server listens, when its flags do not say.

    Raises:
        BadInput: it is empty, badly quoted, uses shell syntax, or a flag's value is not a number.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"the command cannot be read ({error}): {text}") from error
    env = {}
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    if not words:
        raise BadInput("the command to profile is empty")
    shell = _SHELL_WORDS & set(words)
    if shell:
        raise BadInput(
            f"the command uses the shell's {sorted(shell)[0]!r}: it is started without a shell",
            "put it in a script, or wrap it: bash -c '…'; then name the engine and the URL",
        )
    found = find_head(words)
    if found is None:
        named = engine_named(engine_name) if engine_name else None
        address = url or (f"http://{named.host}:{named.port}" if named else "")
        return ServerCommand(tuple(words), env, named, url=address)
    engine, _, end = found
    return _understand(engine, words, end, env, url)


def _understand(
    engine: Engine, words: list[str], end: int, env: dict[str, str], url: str
) -> ServerCommand:
    rest = words[end:]
    model = flag_value(rest, engine.model_flags)
    place = _positional(rest) if model is None and engine.positional else None
    if place is not None:
        model = rest[place]
    own = [word for index, word in enumerate(rest) if index != place]
    size = flag_value(rest, engine.tp_flags) or "1"
    port = flag_value(rest, ("--port",)) or str(engine.port)
    if not size.isdigit() or not port.isdigit():
        raise BadInput(f"the command's port ({port}) or tensor parallel size ({size}) is no number")
    host = _reachable(flag_value(rest, ("--host",)) or engine.host)
    return ServerCommand(
        argv=tuple(words),
        env=env,
        engine=engine,
        engine_args=tuple(_without(own, (*engine.frontend, *engine.model_flags))),
        model=model or "",
        url=url or f"http://{host}:{port}",
        tp_size=int(size),
        served_name=flag_value(rest, ("--served-model-name",)) or "",
        api_key=flag_value(rest, ("--api-key",)) or "",
        recognised=True,
    )


def _reachable(host: str) -> str:
    """Where to knock: a server that listens on every address is asked on the loopback."""
    if host in ("0.0.0.0", "localhost", "::", "[::]"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _flag(word: str) -> str:
    """A word's flag with dashes, without ``=value``; empty for another word."""
    if not word.startswith("-") or re.match(r"-\d", word):
        return ""
    return word.partition("=")[0].replace("_", "-")


def has_flag(words: tuple[str, ...] | list[str], flags: tuple[str, ...]) -> bool:
    """Whether one of the flags stands in ``words``, also in its dotted form ``--flag.key``."""
    wanted = {flag.replace("_", "-") for flag in flags}
    found = {_flag(word) for word in words}
    return bool(wanted & (found | {flag.partition(".")[0] for flag in found}))


def flag_value(words: list[str], flags: tuple[str, ...]) -> str | None:
    """The value of the first of ``flags`` found, from ``--flag value`` or ``--flag=value``."""
    for index, word in enumerate(words):
        if _flag(word) in flags:
            _, equals, value = word.partition("=")
            if equals:
                return value
            return words[index + 1] if index + 1 < len(words) else None
    return None


def _without(words: list[str], flags: tuple[str, ...]) -> list[str]:
    """``words`` without those flags and their values; every one of them takes a value."""
    kept = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif _flag(word) in flags:
            skip = "=" not in word
        else:
            kept.append(word)
    return kept


def _positional(words: list[str]) -> int | None:
    """Where the model stands.

    The first word, when it is no flag; else a folder with a config.json; else a word that no flag
    stands before. Which flags take a value is not known here, so the order matters.
    """
    free = [index for index, word in enumerate(words) if not word.startswith("-")]
    if free and free[0] == 0:
        return 0
    for index in free:
        if (Path(words[index]) / "config.json").is_file():
            return index
    loose = [index for index in free if not _flag(words[index - 1]) or "=" in words[index - 1]]
    return loose[0] if loose else None


def model_folder(model: str) -> Path | None:
    """The folder of a model's config.json: itself, or its snapshot in the Hugging Face cache."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = cache / f"models--{model.replace('/', '--')}" / "snapshots"
    found = [path for path in folder.glob("*") if (path / "config.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def vllm_compiles(words: tuple[str, ...]) -> bool:
    """Whether vLLM compiles the model: its module hooks do not run in compiled code."""
    listed = list(words)
    if has_flag(words, ("--enforce-eager", "-O0")):
        return False
    level = flag_value(
        listed, ("--optimization-level", "-O", "-O.mode", "--compilation-config.mode")
    )
    text = flag_value(listed, ("--compilation-config", "-cc"))
    mode = level
    if text:
        try:
            mode = str(json.loads(text).get("mode", level))
        except (json.JSONDecodeError, AttributeError):
            return True  # vLLM will say what is wrong with it
    return str(mode) not in ("0", "NONE")
