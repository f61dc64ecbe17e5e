"""The options of ``opkit collect``, checked once: what is collected, from what, and how."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from opkit.align.ledger import Ledger
from opkit.align.policy import load_policy
from opkit.collect.admission import Admission, ask_ledger
from opkit.collect.groups import Subject, make_groups
from opkit.collect.measurement import Timing
from opkit.collect.record import Record, folder_of
from opkit.collect.sweep import Sweep, phases_of, read_sweep, select
from opkit.collect.work import Group
from opkit.collect.workers.gpus import Gpu, list_gpus
from opkit.errors import BadInput, ToolMissing, WrongUsage
from opkit.layers.op import GemmCase, LaunchMode, Op, Phase
from opkit.layers.provenance import file_digest
from opkit.layers.registry import find_op, mock_backends, require_mock

PROBE_LIMIT_S = 60  # to ask an interpreter for a package's version
# How an engine launches a phase when no verdict tells. Rows that know no phase stand for both; a
# graph shows the kernels' own time.
MODES = {"": LaunchMode.GRAPH, Phase.CONTEXT: LaunchMode.EAGER, Phase.GENERATION: LaunchMode.GRAPH}
# Whose mock is measured when the user names none, where it is not the first that there is: a
# product of matrices needs no engine.
DEFAULT_BACKENDS = {"gemm": "torch"}
WITHOUT_MODEL = {("gemm", "torch")}  # the case says all


@dataclass(frozen=True)
class Where:
    """Where the work runs.

    Attributes:
        gpus: of this host; empty on a host without (only what runs on a CPU can be collected).
        python: interpreter that has the framework.
        engine: ``local``, or ``ray`` for a cluster.
        ray_address: of a running cluster; empty for the environment's, or a local one.
        lanes: workers of a Ray cluster at most; None for one a GPU.
        case_timeout, build_timeout: seconds.
        retry_failed: measure quarantined cases again.
    """

    gpus: tuple[Gpu, ...]
    python: str
    engine: str = "local"
    ray_address: str = ""
    lanes: int | None = None
    case_timeout: float = 120.0
    build_timeout: float = 900.0
    retry_failed: bool = False


@dataclass(frozen=True)
class CollectOptions:
    """What the user gave, one field an option of the same name; see ``opkit collect --help``."""

    op: str
    backend: str
    model: Path | None
    engine_args: str
    phases: tuple[str, ...]
    tp: tuple[int, ...]
    sweep: Path | None
    case_filter: tuple[str, ...]
    limit: int | None
    smoke: bool
    shuffle: int | None
    waive: str
    policy: Path | None
    timing: Timing
    latency: str
    eager: bool
    gpus: str
    python: str
    engine: str
    ray_address: str
    ray_workers: int | None
    case_timeout: float
    build_timeout: float
    retry_failed: bool
    seed: int
    out: Path


@dataclass(frozen=True)
class Job:
    """A collection, ready to run: nothing is checked again later."""

    op: Op
    admission: Admission
    subject: Subject
    sweep: Sweep
    timing: Timing
    groups: tuple[Group, ...]
    where: Where
    folder: Path
    record: Record


NO_GPU = "CPU"  # what stands for the GPU's name where there is none
PLANNING = "only planned"  # the waiver of a plan: nothing is measured by it


def prepare(options: CollectOptions, *, only_plan: bool = False) -> Job:
    """Check the options, ask the ledger, lay out the work. Starts nothing on a GPU.

    Args:
        options: what the user gave.
        only_plan: nothing is to be run: a missing GPU, framework, model or verdict is no error.

    Raises:
        OpkitError: options, files or programs that cannot be used; Refused when nothing admits it.
    """
    op = find_op(options.op)
    backend = options.backend or DEFAULT_BACKENDS.get(op.name) or mock_backends(op)[0]
    require_mock(op, backend)
    phases = _phases(op, options.phases)
    where = where_of(
        options.gpus, options.python, options.engine, options.ray_address, options.ray_workers,
        options.case_timeout, options.build_timeout, options.retry_failed,
    )  # fmt: skip
    gpu = where.gpus[0].name if where.gpus else NO_GPU
    if len({item.name for item in where.gpus}) > 1:
        raise WrongUsage("one table holds for one kind of GPU; choose with --gpus")
    if backend != "torch" and not where.gpus and where.engine == "local" and not only_plan:
        raise ToolMissing(f"no GPU is visible on this host, and the {backend} mock needs one")
    framework = _framework(options.python, backend, only_plan)
    model = "" if only_plan and options.model is None else _model(options, op, backend)
    digest = file_digest(Path(model) / "config.json") if model else ""
    waiver = options.waive.strip()
    admission = ask_ledger(
        Ledger(options.out / "ledger.db"), op, phases, backend,
        gpu=gpu if where.gpus else "", policy=load_policy(options.policy),
        waiver=waiver or (PLANNING if only_plan else ""), eager=options.eager,
        framework=framework, model=digest,
    )  # fmt: skip
    gpu = gpu if where.gpus else _aligned_gpu(admission) or gpu
    sweep = select(
        read_sweep(op, options.sweep),
        phases=options.phases, tp=options.tp, filters=options.case_filter, smoke=options.smoke,
        shuffle=options.shuffle, limit=options.limit,
    )  # fmt: skip
    if sweep.tp != (1,) and any(isinstance(case, GemmCase) for case in sweep.cases):
        raise WrongUsage(f"{op.name} is not shared by tensor-parallel ranks; leave tp out")
    # A plan's own waiver decides nothing: its keys are those of the run that is planned.
    asked = replace(admission, waiver=waiver)
    on_cpu = gpu == NO_GPU and where.engine == "local"
    subject = Subject(
        op=op,
        backend=backend,
        model=model,
        engine_args=_words(options.engine_args) or admission.engine_args(),
        modes=_modes(phases, admission, options.eager or on_cpu),
        seed=options.seed,
        admitted={phase: asked.subject(phase, framework, gpu, digest) for phase in phases},
    )
    groups = make_groups(subject, sweep, options.timing, ordered=options.shuffle is not None)
    folder = folder_of(options.out, op.name, backend)
    record = _record(subject, admission, options, sweep)
    return Job(op, admission, subject, sweep, options.timing, tuple(groups), where, folder, record)


def _phases(op: Op, asked: Sequence[str]) -> tuple[str, ...]:
    known = phases_of(op)
    wrong = sorted(set(asked) - set(known))
    if wrong:
        raise WrongUsage(
            f"{op.name} has no phase {wrong[0]}",
            "one table holds for both phases" if op.phases and known == ("",) else None,
        )
    return tuple(phase for phase in known if not asked or phase in asked)


def where_of(
    gpus: str,
    python: str,
    engine: str = "local",
    ray_address: str = "",
    workers: int | None = None,
    case_timeout: float = 120.0,
    build_timeout: float = 900.0,
    retry_failed: bool = False,
) -> Where:
    """Where the work is to run.

    Raises:
        WrongUsage: ``gpus`` names one that is not there.
    """
    found = list_gpus()
    if gpus not in ("", "all"):
        try:
            wanted = [int(word) for word in gpus.split(",")]
        except ValueError as error:
            raise WrongUsage(f"--gpus {gpus}: numbers and commas, or all") from error
        known = {gpu.index: gpu for gpu in found}
        missing = [number for number in wanted if number not in known]
        if missing:
            raise WrongUsage(f"there is no GPU {missing[0]}; there are {sorted(known) or 'none'}")
        found = [known[number] for number in dict.fromkeys(wanted)]
    return Where(
        tuple(found), python, engine, ray_address, workers, case_timeout, build_timeout,
        retry_failed,
    )  # fmt: skip


def framework_version(python: str, package: str) -> str:
    """The version of a framework in an interpreter, without importing it.

    Raises:
        ToolMissing: the interpreter cannot be run, or has no such package.
    """
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolMissing(f"{python}: cannot be run ({error})") from error
    if done.returncode:
        raise ToolMissing(
            f"{package} is not installed for {python}",
            "name the interpreter that has it: --python",
        )
    return done.stdout.strip()


def _framework(python: str, backend: str, only_plan: bool) -> str:
    """The framework's version; empty for a plan on a host that has it not."""
    try:
        return framework_version(python, backend)
    except ToolMissing:
        if only_plan:
            return ""
        raise


def _aligned_gpu(admission: Admission) -> str:
    """The GPU that the verdicts hold for, where this host, a cluster's head, has none of its own.

    The builds' workers are held against it.
    """
    return next((entry.gpu for entry in admission.entries.values() if entry.gpu), "")


def _model(options: CollectOptions, op: Op, backend: str) -> str:
    if (op.name, backend) in WITHOUT_MODEL:
        return ""
    if options.model is None:
        raise WrongUsage("the model's folder is not known", "give it with --model DIR")
    if not (options.model / "config.json").is_file():
        raise BadInput(f"{options.model}: no config.json there")
    return str(options.model.absolute())


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise WrongUsage(f"--engine-args cannot be read ({error}): {text}") from error


def _modes(phases: Sequence[str], admission: Admission, eager: bool) -> Mapping[str, LaunchMode]:
    if eager:
        return dict.fromkeys(phases, LaunchMode.EAGER)
    known = {str(phase): mode for phase, mode in MODES.items()}
    return {phase: admission.mode(phase) or known.get(phase, LaunchMode.GRAPH) for phase in phases}


def _record(
    subject: Subject, admission: Admission, options: CollectOptions, sweep: Sweep
) -> Record:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        op=subject.op.name,
        backend=subject.backend,
        model=subject.model,
        engine_args=subject.engine_args,
        modes=dict(subject.modes),
        seed=subject.seed,
        admitted={phase: dict(found) for phase, found in subject.admitted.items()},
        timing=options.timing,
        latency=options.latency,
        series=tuple(subject.series(options.timing, phase) for phase in subject.admitted),
        verdicts=admission.verdicts,
        waiver=admission.waiver,
        differences=admission.differences,
        created=now,
        updated=now,
        planned=sweep.count(),
        python=os.path.abspath(options.python) if os.sep in options.python else options.python,
    )


def again(record: Record, op: Op) -> Subject:
    """The subject of a collection that is to be measured again."""
    return Subject(
        op, record.backend, record.model, record.engine_args, record.modes, record.seed,
        record.admitted,
    )  # fmt: skip
