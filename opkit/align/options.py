"""The options of ``opkit align``, checked once: a question about files, or a run to make first."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

from opkit.align import run
from opkit.align.files import read_manifest, refuse_other_backend
from opkit.align.judge import Question, judge
from opkit.align.policy import Policy, load_policy
from opkit.align.profile.command_line import read_command
from opkit.align.profile.e2e import Collect, E2ERequest, Mode, parse_wave
from opkit.align.result import AlignResult, Method
from opkit.align.result_json import align_json
from opkit.errors import BadInput, WrongUsage
from opkit.layers.captured import require_capture_of
from opkit.layers.manifest import Manifest
from opkit.layers.op import Op, Phase
from opkit.layers.plan import INPUTS
from opkit.layers.registry import find_op, mock_backends, require_mock
from opkit.nsys_parsers.trace import open_trace

METHODS = {"auto": None, "nvtx": Method.LAUNCH_NVTX, "sequence": Method.SEQUENCE}
DEFAULT_BACKEND = "vllm"  # when the command is no server that says it
# The bundled recordings, the mock's and the engine's.
RECORDED = {"dsa": ("dsa-vllm-h100-mock.sqlite.gz", "dsa-vllm-h100-e2e.sqlite.gz")}


# What tells a run how to go, with the command line's defaults; files would silently lose it. (The
# default of --python is the machine's.)
OF_A_MOCK: dict[str, object] = {
    "model": None,
    "iterations": 20,
    "layer": 0,
    "engine": "",
    "seed": 0,
}
OF_AN_ENGINE: dict[str, object] = {
    "mode": None,
    "window": Collect.WAVES.value,
    "requests": (),
    "url": "",
    "ranks": None,
    "delay": 300,
    "duration": 60,
    "ready_limit": 900,
}


@dataclass(frozen=True)
class AlignOptions:
    """What the user gave, one field an option of the same name; see ``opkit align --help``."""

    op: str
    recorded: bool
    mock_trace: Path | None
    e2e_trace: tuple[Path, ...]
    strict_trace: Path | None
    backend: str
    model: Path | None
    e2e_cmd: str
    mode: str | None
    window: str
    requests: tuple[str, ...]
    phases: tuple[str, ...]
    policy: Path | None
    strict: bool
    regions: str
    iterations: int
    python: str
    engine: str
    url: str
    ranks: int | None
    delay: float
    duration: float
    ready_limit: float
    seed: int
    inputs: str
    captured: Path | None
    layer: int
    out: Path


@dataclass(frozen=True)
class Answer:
    """A result and where it belongs.

    Attributes:
        result: what was found.
        folder: where its files are.
        keep: whether it goes into the ledger: a bundled recording says nothing of this machine.
    """

    result: AlignResult
    folder: Path
    keep: bool


def answer(
    options: AlignOptions,
    progress: run.Progress,
    before_run: Callable[[run.LiveRequest], None] | None = None,
) -> Answer:
    """Do what the options ask: judge files, or profile both sides first.

    Args:
        before_run: called with the checked request of a run, before anything of it is started; may
            raise to stop it. Not called when files are judged.

    Raises:
        OpkitError: options, files or programs that cannot be used.
        KeyboardInterrupt: after everything started has been ended.
    """
    op, policy, phases = _common(options)
    files = _files(options)
    if files is not None:
        mock, e2e, strict = files
        method = METHODS[options.regions]
        question = Question(op, mock, e2e, options.backend, policy, phases, strict, method)
        return Answer(judge(question), options.out, keep=not options.recorded)
    request = _live(options, op, policy, phases)
    require_mock(op, request.backend)
    if before_run is not None:
        before_run(request)
    result = run.align_live(request, progress)
    folder = request.e2e.out_dir
    (folder / "result.json").write_text(json.dumps(align_json(result), indent=1) + "\n")
    return Answer(result, folder, keep=True)


def dry_run(options: AlignOptions) -> str:
    """Every command that :func:`answer` would run.

    Raises:
        OpkitError: options that cannot be used.
    """
    op, policy, phases = _common(options)
    files = _files(options)
    if files is not None:
        mock, e2e, strict = files
        read = [mock, *e2e, *([strict] if strict else [])]
        return "".join(f"# read {path}\n" for path in read) + "# nothing is run\n"
    request = _live(options, op, policy, phases)
    text = run.dry_run(request)
    if request.backend not in mock_backends(op):
        known = ", ".join(mock_backends(op))
        text = f"# note: opkit has no mock of {op.name} for {request.backend} yet ({known})\n{text}"
    return text


def _common(options: AlignOptions) -> tuple[Op, Policy, tuple[Phase, ...]]:
    op = find_op(options.op)
    phases = tuple(phase for phase in op.phases if phase in options.phases) or op.phases
    return op, load_policy(options.policy), phases


def _files(options: AlignOptions) -> tuple[Path, tuple[Path, ...], Path | None] | None:
    """The mock's, the engine's and the strict trace to judge, or None for a live run."""
    traces = (options.mock_trace, *options.e2e_trace, options.strict_trace)
    if options.e2e_trace and options.mock_trace is None and options.strict_trace is None:
        traces = ()  # the engine's side as recorded: only the mock is run
    if sum((options.recorded, any(traces or options.e2e_trace), bool(options.e2e_cmd))) > 1:
        raise WrongUsage(
            "--recorded, trace files and --e2e-cmd exclude each other",
            "a run makes its own traces; files are compared without running anything",
        )
    if options.recorded or any(traces):
        _refuse_of_a_run(options)
    if options.recorded:
        if options.strict:
            raise WrongUsage(
                "--strict runs a second mock or compares its trace, and --recorded has none",
                "give --e2e-cmd, or files with --strict-trace",
            )
        return _recorded(options.op)
    if any(traces):
        if options.mock_trace is None or not options.e2e_trace:
            missing = "--mock-trace" if options.mock_trace is None else "--e2e-trace"
            raise WrongUsage(
                f"--mock-trace is compared with an --e2e-trace, and no {missing} was given",
                "with --e2e-trace alone the mock is run; without traces, --e2e-cmd makes both",
            )
        if options.strict and options.strict_trace is None:
            raise WrongUsage("--strict compares files only with --strict-trace")
        return options.mock_trace, options.e2e_trace, options.strict_trace
    if not options.e2e_cmd and not options.e2e_trace:
        raise WrongUsage(
            "nothing to align: no command and no traces were given",
            'give --e2e-cmd "…", or --mock-trace and --e2e-trace, or try '
            f"`opkit align {options.op} --recorded`",
        )
    return None


def _refuse_of_a_run(options: AlignOptions) -> None:
    """Files are only compared: options of a run would be silently lost."""
    if options.inputs != INPUTS[0] or options.captured:
        raise WrongUsage(
            "--inputs and --captured are for a mock that is run, and files are only compared",
            "give --e2e-cmd, or --e2e-trace alone",
        )
    _refuse(options, OF_A_MOCK | OF_AN_ENGINE, "are only compared", "give --e2e-cmd")


def _refuse(options: AlignOptions, of_a_run: dict[str, object], why: str, hint: str) -> None:
    given = [name for name, default in of_a_run.items() if getattr(options, name) != default]
    if given:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        verb = "is" if len(given) == 1 else "are"
        raise WrongUsage(f"{named} {verb} for a run, and recordings {why}", hint)


def _recorded(op: str) -> tuple[Path, tuple[Path, ...], None]:
    folder = Path(str(resources.files("opkit") / "recorded"))
    found = [folder / name for name in RECORDED.get(op, ())]
    if not found or not all(path.is_file() for path in found):
        raise BadInput(
            f"this installation of opkit holds no recording of {op}",
            "give --mock-trace and --e2e-trace, or --e2e-cmd on a GPU host",
        )
    return found[0], (found[1],), None


def _live(
    options: AlignOptions, op: Op, policy: Policy, phases: tuple[Phase, ...]
) -> run.LiveRequest:
    if options.regions != "auto":
        raise WrongUsage("--regions is for trace files", "give --mock-trace and --e2e-trace")
    if options.url:
        _check_url(options.url)
    waves = tuple(parse_wave(text) for text in options.requests)
    command, seed = options.e2e_cmd, options.seed
    if not command:  # what is run beside the recording is what was recorded
        if options.inputs != "captured" or options.captured:  # else the engine runs once more
            _refuse(options, OF_AN_ENGINE, "are read as they are", "give --e2e-cmd")
        recorded = _recorded_manifest(options.e2e_trace[0])
        refuse_other_backend(options.e2e_trace[0], recorded, options.backend)
        command, waves = shlex.join(recorded.command), waves or recorded.waves
        seed = options.seed or recorded.seed
    engine = read_command(command, options.engine, options.url).engine
    if engine and options.backend not in ("", engine.name):
        raise WrongUsage(
            f"the command serves with {engine.name}, and --backend says {options.backend}",
            "leave --backend out: the mock is built with the command's engine",
        )
    backend = options.backend or (engine.name if engine else DEFAULT_BACKEND)
    _check_inputs(options, op, backend)
    name = f"align-{op.name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    e2e = E2ERequest(
        command=command,
        out_dir=options.out / name,
        op=op.name,
        mode=Mode(options.mode) if options.mode else None,
        window=Collect(options.window),
        waves=waves,
        engine=options.engine,
        url=options.url,
        model_dir=options.model,
        seed=seed,
        ready_limit_s=options.ready_limit,
        ranks=options.ranks,
        delay_s=options.delay,
        duration_s=options.duration,
    )
    return run.LiveRequest(
        op=op,
        backend=backend,
        e2e=e2e,
        policy=policy,
        phases=phases,
        strict=options.strict,
        python=options.python,
        iterations=options.iterations,
        traces=options.e2e_trace,
        inputs=options.inputs,
        captured=options.captured,
        layer=options.layer,
    )


def _check_inputs(options: AlignOptions, op: Op, backend: str) -> None:
    """Refuse before the engine's run, which takes minutes, what the mock would refuse after it."""
    if backend in mock_backends(op) and backend not in op.region:
        raise BadInput(
            f"the {backend} mock of {op.name} stands for no engine, so nothing aligns it; "
            f"engines: {', '.join(sorted(op.region))}",
            f"opkit check {op.name} --backend {backend}",
        )
    if options.captured is not None and options.inputs != "captured":
        raise WrongUsage("--captured is for --inputs captured")
    if options.captured is not None:
        require_capture_of(options.captured, op.name, backend)
    elif options.inputs == "captured" and backend != "vllm":
        raise BadInput(
            f"a run of the engine stores inputs for the mock of vLLM, not for that of {backend}",
            "give what was stored otherwise: --captured FOLDER",
        )


def _recorded_manifest(path: Path) -> Manifest:
    """The manifest of a recording, which tells its serving command."""
    with open_trace(path) as trace:
        manifest = read_manifest(trace.facts)
    if manifest is None or not manifest.command:
        raise BadInput(
            f"{path}: does not say which command it was recorded from, so no mock can be built",
            "give --mock-trace, or record with `opkit align --e2e-cmd`",
        )
    return manifest


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme == "http" and bool(parts.hostname) and parts.port is not None
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise BadInput(f"{url!r}: not a server's address", "as in http://127.0.0.1:8000")
