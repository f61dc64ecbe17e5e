"""The plans: how a serving command is put under nsys, for each ``--mode``.

Options of nsys as of 2024.2.3, each tried with it: ``launch`` takes no ``--sample`` (``start``
does); ``profile --start-later`` keeps its output name until ``start``; ``--session-new`` expands
``%q{VAR}``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from uuid import uuid4

from opkit.align.profile.command_line import ServerCommand
from opkit.align.profile.plan import (
    Command,
    End,
    Finish,
    Post,
    ProfilePlan,
    Purpose,
    Ready,
    Run,
    Send,
    Start,
    Step,
    Window,
)
from opkit.align.profile.target import Target, prepare_target
from opkit.errors import BadInput
from opkit.layers.manifest import Wave

_TRACE = ("-t", "cuda,nvtx", "--cuda-graph-trace=node", "--trace-fork-before-exec=true")
_NO_CPU = ("--sample=none", "--cpuctxsw=none")  # CPU samples cost time and explain no kernel
_RANK = "OMPI_COMM_WORLD_RANK"
_STOP_LIMIT_S = 1800.0  # nsys converts the recording before `stop` returns

PRIMING_WAVE = Wave(1, 16, 2)  # both phases, and short: its steps are set aside


class Mode(StrEnum):
    """How nsys is put around the command."""

    SERVER = "server"
    PROGRAM = "program"
    SYSTEM_WIDE = "system-wide"
    PER_RANK = "per-rank"


class Collect(StrEnum):
    """From when on a server is recorded."""

    WAVES = "waves"  # the requests only
    PROCESS = (
        "process"  # from process start, so that CUDA graphs' node creations have module ranges
    )


@dataclass(frozen=True)
class E2ERequest:
    """What the user asks for.

    Attributes:
        command: ``--e2e-cmd``, as typed.
        out_dir: folder for reports, sidecars and logs.
        op: the op's name, for the sidecar.
        mode: None: server for a known engine, else program.
        window: see :class:`Collect`.
        waves: requests to send; empty: ``e2e.DEFAULT_WAVES``.
        engine: the engine's name, when the command hides it in a script; ``url`` where it listens.
        model_dir: folder with the model's config.json, when the command does not lead to it.
        seed: of the prompts.
        warmup: how often every wave is sent before the recording: engines compile kernels at the
            first use of a shape.
        ready_limit_s, wave_limit_s, program_limit_s: seconds.
        ranks: MPI ranks in per-rank mode; None: the command's tensor parallel size.
        delay_s, duration_s: nsys's window in system-wide mode, seconds.
        env: variables to set for the command.
    """

    command: str
    out_dir: Path
    op: str = ""
    mode: Mode | None = None
    window: Collect = Collect.WAVES
    waves: tuple[Wave, ...] = ()
    engine: str = ""
    url: str = ""
    model_dir: Path | None = None
    seed: int = 0
    warmup: int = 2
    ready_limit_s: float = 900.0
    wave_limit_s: float = 900.0
    program_limit_s: float = 3600.0
    ranks: int | None = None
    delay_s: float = 300.0
    duration_s: float = 60.0
    env: dict[str, str] = field(default_factory=dict)


def build_plan(request: E2ERequest, server: ServerCommand, nsys: Path, mode: Mode) -> ProfilePlan:
    """The steps for ``mode``.

    Raises:
        BadInput: the mode does not fit the command.
    """
    if server.engine is None and mode in (Mode.SERVER, Mode.PER_RANK, Mode.SYSTEM_WIDE):
        raise BadInput(
            f"mode {mode} needs a serving engine, and none is recognised in: {request.command}",
            "name the engine and its URL, or use mode program",
        )
    if server.engine is not None and mode is Mode.PROGRAM:
        raise BadInput(f"{server.engine.name} serves until it is ended: use mode server")
    target = prepare_target(server, request.env, request.out_dir)
    session = f"opkit-{uuid4().hex[:8]}"
    builders: dict[Mode, Callable[[E2ERequest, ServerCommand, Path, Target, str], ProfilePlan]] = {
        Mode.SERVER: _server,
        Mode.PROGRAM: _program,
        Mode.SYSTEM_WIDE: _system_wide,
        Mode.PER_RANK: _per_rank,
    }
    return builders[mode](request, server, nsys, target, session)


def nsys_output(report: Path) -> str:
    """A report's path for ``-o``: without suffix, and nothing in it that nsys would expand."""
    return str(report.with_suffix("")).replace("%", "%%")


def _server(
    request: E2ERequest, server: ServerCommand, nsys: Path, target: Target, session: str
) -> ProfilePlan:
    report = request.out_dir / "e2e.nsys-rep"
    output = ("-o", nsys_output(report), "--force-overwrite=true")
    whole = request.window is Collect.PROCESS
    verb = ("profile", *_NO_CPU, *output) if whole else ("launch",)
    # With --wait=all nsys would outlive a dead server for the sake of a worker that hangs.
    argv = (str(nsys), *verb, f"--session-new={session}", *_TRACE, "--wait=primary", *target.argv)
    start = Start(Command(argv, "start the server under nsys", target.env))
    opened = Command(
        (str(nsys), "start", f"--session={session}", *output, *_NO_CPU), "open the window"
    )
    notes = target.notes
    if whole:
        notes += ("recorded from process start: nsys may drop GPU events of a long start-up",)
    return ProfilePlan(
        steps=(
            start,
            *_warm(request, server, target),
            *(() if whole else (Run(opened), _prime(request, server))),
            _send(request, server),
            Run(_stop(nsys, session), _STOP_LIMIT_S),
            End(),
        ),
        reports=(report,),
        log=request.out_dir / "e2e.log",
        nsys=nsys,
        sessions=(session,),
        files=target.files,
        notes=notes,
    )


def _program(
    request: E2ERequest, _server: ServerCommand, nsys: Path, target: Target, session: str
) -> ProfilePlan:
    report = request.out_dir / "e2e.nsys-rep"
    output = ("-o", nsys_output(report), "--force-overwrite=true")
    argv = (str(nsys), "profile", f"--session-new={session}", *_TRACE, *_NO_CPU, *output)
    return ProfilePlan(
        steps=(
            Start(Command((*argv, *target.argv), "run the program under nsys", target.env)),
            Finish(request.program_limit_s),
        ),
        reports=(report,),
        log=request.out_dir / "e2e.log",
        nsys=nsys,
        sessions=(session,),
        files=target.files,
        notes=target.notes,
    )


def _system_wide(
    request: E2ERequest, server: ServerCommand, nsys: Path, target: Target, session: str
) -> ProfilePlan:
    report = request.out_dir / "e2e.nsys-rep"
    argv = [str(nsys), "profile", f"--session-new={session}", "-t", "cuda,nvtx,osrt"]
    argv += ["--sample=system-wide", "--cpuctxsw=system-wide", "--cuda-graph-trace=node"]
    argv += ["--trace-fork-before-exec=true", "--wait=primary"]
    argv += [f"--delay={request.delay_s:g}", f"--duration={request.duration_s:g}"]
    argv += ["-o", nsys_output(report), "--force-overwrite=true", *target.argv]
    return ProfilePlan(
        steps=(
            Start(Command(tuple(argv), "start the server under nsys, system-wide", target.env)),
            *_warm(request, server, target),
            Window(request.delay_s, request.duration_s),
            _send(request, server),
            # nsys ends the server with SIGTERM when its window closes, and passes on that code.
            Finish(request.duration_s + _STOP_LIMIT_S, codes=None),
        ),
        reports=(report,),
        log=request.out_dir / "e2e.log",
        nsys=nsys,
        sessions=(session,),
        files=target.files,
        notes=(
            *target.notes,
            "system-wide is CPU sampling: CUDA is traced only in processes that nsys started",
        ),
    )


def _per_rank(
    request: E2ERequest, server: ServerCommand, nsys: Path, target: Target, session: str
) -> ProfilePlan:
    ranks = request.ranks if request.ranks is not None else server.tp_size
    if ranks < 1:
        raise BadInput(f"{ranks} ranks: at least one is needed")
    if Path(target.argv[0]).name in ("mpirun", "mpiexec", "srun"):
        raise BadInput("mode per-rank starts mpirun itself: give the command without it")
    inner = target.argv
    if server.engine is not None and server.engine.name == "trtllm":
        inner = inner if "trtllm-llmapi-launch" in inner else ("trtllm-llmapi-launch", *inner)
    whole = request.window is Collect.PROCESS
    env = dict(target.env)
    if os.geteuid() == 0:  # Open MPI refuses root without both
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    passed = [*target.env, *(["OPAL_PREFIX"] if "OPAL_PREFIX" in os.environ else [])]
    argv = ["mpirun", "-n", str(ranks)]
    argv += [word for name in passed for word in ("-x", name)]
    argv += [str(nsys), "profile", f"--session-new={session}-%q{{{_RANK}}}"]
    argv += [] if whole else ["--start-later=true"]
    folder = str(request.out_dir).replace("%", "%%")
    argv += [*_TRACE, *_NO_CPU, "--wait=primary", "-o", f"{folder}/rank%q{{{_RANK}}}"]
    argv += ["--force-overwrite=true", *inner]
    sessions = tuple(f"{session}-{rank}" for rank in range(ranks))
    opened: tuple[Step, ...] = tuple(
        Run(Command((str(nsys), "start", f"--session={name}"), f"open the window of {name}"))
        for name in sessions
    )
    return ProfilePlan(
        steps=(
            Start(Command(tuple(argv), f"start {ranks} ranks, each under its own nsys", env)),
            *_warm(request, server, target),
            *(() if whole else (*opened, _prime(request, server))),
            _send(request, server),
            *(Run(_stop(nsys, name), _STOP_LIMIT_S) for name in sessions),
            End(),
        ),
        reports=tuple(request.out_dir / f"rank{rank}.nsys-rep" for rank in range(ranks)),
        log=request.out_dir / "e2e.log",
        nsys=nsys,
        sessions=sessions,
        files=target.files,
        notes=target.notes,
    )


def _stop(nsys: Path, session: str) -> Command:
    return Command(
        (str(nsys), "stop", f"--session={session}"), "close the window, write the report"
    )


def _warm(request: E2ERequest, server: ServerCommand, target: Target) -> tuple[Step, ...]:
    engine = server.engine
    assert engine is not None, "build_plan checks it"
    steps: list[Step] = [Ready(server.url + engine.health, request.ready_limit_s)]
    if request.warmup:
        url = server.url + engine.completions
        limit_s, rounds = request.wave_limit_s, request.warmup
        steps.append(Send(url, request.waves, Purpose.WARM_UP, limit_s, rounds))
    # Last, so that only recorded steps are labelled.
    if engine.labels_on and any("cuda" in w and "profiler" in w for w in target.argv):
        steps.append(Post(server.url + engine.labels_on, "switch step labels on"))
    return tuple(steps)


def _prime(request: E2ERequest, server: ServerCommand) -> Send:
    """A small request first: nsys 2024.2 loses the first ranges and kernels of a window."""
    assert server.engine is not None, "build_plan checks it"
    url = server.url + server.engine.completions
    return Send(url, (PRIMING_WAVE,), Purpose.PRIME, request.wave_limit_s)


def _send(request: E2ERequest, server: ServerCommand) -> Send:
    assert server.engine is not None, "build_plan checks it"
    url = server.url + server.engine.completions
    return Send(url, request.waves, Purpose.RECORD, request.wave_limit_s)
