"""The command as it is started: with the flags, variables and YAML that a recording needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import opkit
from opkit.align.profile.command_line import ServerCommand, has_flag, vllm_compiles
from opkit.align.profile.engines import Engine


@dataclass(frozen=True)
class Target:
    """What nsys will start.

    Attributes:
        argv, env: the command and the variables to set for it.
        files: files that it reads, to be written first: path and text.
        notes: what was added or could not be, for the reader of the report.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    files: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()


def prepare_target(server: ServerCommand, env: dict[str, str], out_dir: Path) -> Target:
    """Add what the engine needs for ranges and known shapes, where the user has not decided."""
    engine, given = server.engine, {**server.env, **env}
    if engine is None:
        return Target(server.argv, given)
    notes = []
    for name, (value, note) in (engine.env or {}).items():
        if name not in given and name not in os.environ:
            given[name] = value
            if note:
                notes.append(f"{name}={value} set: {note}")
    if not server.recognised:
        notes.append(f"the command hides {engine.name}'s flags: opkit added none")
        return Target(server.argv, given, (), tuple(notes))
    argv, switch_notes = _with_switches(engine, server.argv)
    if engine.imports_opkit:
        given = with_opkit(given)
    files: tuple[tuple[Path, str], ...] = ()
    if engine.config_flags:
        wanted, config_notes = _config(engine, argv)
        if wanted:
            files = ((out_dir / f"{engine.name}-opkit.yaml", wanted),)
            argv += (engine.config_flags[0], str(files[0][0]))
        switch_notes += config_notes
    if engine.name == "vllm" and vllm_compiles(argv):
        switch_notes.append(
            "vLLM compiles this model: no module ranges in compiled code, regions are found by "
            "sequence (--compilation-config '{\"mode\":0}' keeps them)"
        )
    return Target(argv, given, files, (*notes, *switch_notes))


def with_opkit(env: dict[str, str]) -> dict[str, str]:
    """``env`` with opkit's part for servers on the interpreter's path, and nothing else of opkit's.

    The folder that opkit lies in may hold other packages (all of an environment's), which would
    hide the server's own.
    """
    own = str(Path(opkit.__file__).parent / "inside")
    before = env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    if own in before.split(os.pathsep):
        return env
    return {**env, "PYTHONPATH": os.pathsep.join(part for part in (own, before) if part)}


def _with_switches(engine: Engine, argv: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    notes = []
    for switch in engine.switches:
        if has_flag(argv, (switch.flag, *switch.unless)):
            continue
        if switch.needs and not has_flag(argv, switch.needs):
            notes.append(switch.without)
            continue
        argv += (switch.flag, switch.value) if switch.value else (switch.flag,)
        if switch.note:
            notes.append(f"{switch.flag} added {switch.note}")
    return argv, notes


def _config(engine: Engine, argv: tuple[str, ...]) -> tuple[str, list[str]]:
    """The YAML to give the engine (none when the user gives one) and what it cannot say."""
    missing = ""
    text = engine.config_nvtx + engine.config_cache
    if has_flag(argv, engine.config_flags):
        text, missing = "", text
    elif has_flag(argv, engine.config_clash):
        text, missing = engine.config_nvtx, engine.config_cache
    if not missing:
        return text, []
    words = " ".join(missing.split())
    return text, [f"opkit edits no YAML of yours; ranges and whole prompts need in it: {words}"]
