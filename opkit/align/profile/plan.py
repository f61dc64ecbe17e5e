"""What a profiling run will do, as data: ``--dry-run`` prints the steps that the run performs."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from opkit.layers.manifest import Wave


@dataclass(frozen=True)
class Command:
    """One program to run.

    Attributes:
        argv: program and arguments.
        purpose: why, for people.
        env: variables set in addition to opkit's own environment.
    """

    argv: tuple[str, ...]
    purpose: str
    env: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """The command as a shell would take it."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.env.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


@dataclass(frozen=True)
class Start:
    """Start a command and leave it running; its output goes to the plan's log."""

    command: Command


@dataclass(frozen=True)
class Run:
    """Run a short command to its end within ``limit_s`` seconds; it must end with 0."""

    command: Command
    limit_s: float = 600.0


@dataclass(frozen=True)
class Ready:
    """Poll ``url`` until it answers 200; at most ``limit_s`` seconds, or until the server dies."""

    url: str
    limit_s: float


@dataclass(frozen=True)
class Post:
    """Ask the server for something by a POST: ``purpose`` says for what.

    ``body`` is JSON, empty for none; an answer is awaited for ``limit_s`` seconds.
    """

    url: str
    purpose: str
    body: str = ""
    limit_s: float = 10.0


class Purpose(StrEnum):
    """What requests are sent for. Only those to be recorded count as the run's waves."""

    WARM_UP = "warm up"  # kernels are compiled and chosen at the first use of a shape
    PRIME = "prime the window"  # nsys may lose what runs first in a window
    RECORD = "send the requests"


@dataclass(frozen=True)
class Send:
    """Send every wave ``rounds`` times, with prompts of their own for each purpose."""

    url: str
    waves: tuple[Wave, ...]
    purpose: Purpose
    limit_s: float  # for one wave
    rounds: int = 1


@dataclass(frozen=True)
class Window:
    """Wait until ``delay_s`` s after the start, when nsys opens its window of ``duration_s`` s."""

    delay_s: float
    duration_s: float


@dataclass(frozen=True)
class Finish:
    """Wait at most ``limit_s`` s for the command's own end, with one of ``codes`` (None: any)."""

    limit_s: float
    codes: tuple[int, ...] | None = (0,)


@dataclass(frozen=True)
class End:
    """End the started command politely: SIGINT, SIGTERM, ``nsys shutdown``, SIGKILL."""


Step = Start | Run | Ready | Post | Send | Window | Finish | End


@dataclass(frozen=True)
class ProfilePlan:
    """Steps and what must have come of them.

    Attributes:
        steps: in order; one ``Start`` at most, and the first.
        reports: the ``.nsys-rep`` files that must be new and not empty afterwards.
        log: the started command's output.
        nsys: the nsys program; ``sessions`` its sessions, shut down if they are left over.
        files: small files written before the start: path and text.
        notes: what the reader of the report should know.
        missing: the likely cause when nsys has left no report.
    """

    steps: tuple[Step, ...]
    reports: tuple[Path, ...]
    log: Path
    nsys: Path
    sessions: tuple[str, ...]
    files: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()
    missing: str = ""

    @property
    def commands(self) -> list[Command]:
        """The commands among the steps."""
        return [step.command for step in self.steps if isinstance(step, Start | Run)]

    def text(self) -> str:
        """The plan for people: commands verbatim, all else as shell comments."""
        lines = [f"# note: {note}" for note in self.notes]
        for path, content in self.files:
            lines.append(f"# write {path}:")
            lines += [f"#   {line}" for line in content.splitlines()]
        for step in self.steps:
            lines += _step_lines(step, self.log)
        lines += [f"# result: {report}" for report in self.reports]
        return "\n".join(lines) + "\n"


def _step_lines(step: Step, log: Path) -> Iterable[str]:
    match step:
        case Start(command):
            return [f"# {command.purpose} (output: {log})", f"{command.line()} &"]
        case Run(command):
            return [f"# {command.purpose}", command.line()]
        case Ready(url, limit_s):
            return [f"# wait until GET {url} answers 200, at most {limit_s:.0f} s"]
        case Post(url, purpose, body):
            return [f"# {purpose}: POST {url}{' ' if body else ''}{body}"]
        case Send(url, waves, purpose, _, rounds):
            times = f" {rounds} times" if rounds > 1 else ""
            shapes = ", ".join(wave_text(wave) for wave in waves)
            return [f"# {purpose}{times}: POST {url}: {shapes}"]
        case Window(delay_s, duration_s):
            return [
                f"# wait until {delay_s:.0f} s after the start; {duration_s:.0f} s are recorded"
            ]
        case Finish(limit_s):
            return [f"# wait for its end, at most {limit_s:.0f} s"]
        case End():
            return ["# end it: SIGINT, then SIGTERM, then nsys shutdown, then SIGKILL"]


def wave_text(wave: Wave) -> str:
    """A wave as ``--requests`` takes it: ``4x1024+12``."""
    return f"{wave.requests}x{wave.prompt}+{wave.output}"
