"""Profile the serving engine: request in, plan out; plan in, reports and sidecar manifests out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opkit import __version__
from opkit.align.profile.command_line import ServerCommand, model_folder, read_command
from opkit.align.profile.modes import Collect, E2ERequest, Mode, build_plan
from opkit.align.profile.perform import Outcome, perform
from opkit.align.profile.plan import ProfilePlan, wave_text
from opkit.align.profile.process import Grace, Progress
from opkit.align.profile.server import Client
from opkit.errors import BadInput, ToolMissing
from opkit.layers.manifest import Manifest, Wave, sidecar_of
from opkit.layers.provenance import file_digest
from opkit.layers.registry import find_op
from opkit.nsys_parsers.tool import Nsys, find_nsys

__all__ = [
    "DEFAULT_WAVES",
    "Collect",
    "E2EPlan",
    "E2ERequest",
    "Mode",
    "parse_wave",
    "plan_e2e",
    "run_e2e",
    "wave_text",
]

# Decode steps of a wave. A prefill lowers an H100's clock for up to 100 ms; the first steps after
# it are up to 10 % slow, so most steps must come later (docs/development.md).
DECODED = 96
REGIONS = 3  # of a shape, at least: what the default policy's ``min_regions`` asks for
# Both sides of DSA's index_topk (2,048 tokens), one request and several, and a decode batch of 16.
DEFAULT_WAVES = (
    Wave(1, 512, DECODED),
    Wave(1, 1024, DECODED),
    Wave(1, 4096, DECODED),
    Wave(4, 1024, DECODED),
    Wave(16, 512, DECODED),
)


@dataclass(frozen=True)
class E2EPlan:
    """A plan and what it was made from. ``text()`` is the dry run.

    Attributes:
        plan: the steps.
        request: as asked, with the default waves filled in.
        server: the command as understood; its ``engine_args`` build the mock's engine.
        mode: as chosen.
        model_dir: folder of the model's config.json, if it was found.
        nsys: the nsys that will run.
    """

    plan: ProfilePlan
    request: E2ERequest
    server: ServerCommand
    mode: Mode
    model_dir: Path | None
    nsys: Nsys

    def text(self) -> str:
        """The plan for people."""
        return self.plan.text()


def parse_wave(text: str) -> Wave:
    """Read ``4x1024+12``: four prompts of 1,024 tokens together, 12 output tokens each.

    Raises:
        BadInput: it is not of that form, or a number is zero.
    """
    found = re.fullmatch(r"(\d+)[x×](\d+)\+(\d+)", text.strip())
    if found is None or 0 in (numbers := [int(number) for number in found.groups()]):
        raise BadInput(
            f"{text!r}: not a wave of requests", "write REQUESTSxPROMPT+OUTPUT, as in 4x1024+12"
        )
    return Wave(*numbers)


def plan_e2e(request: E2ERequest, *, dry_run: bool = False) -> E2EPlan:
    """Decide what to run.

    Args:
        dry_run: the plan is only to be read: it may lack nsys (then ``nsys`` stands for it) and the
            model's folder.

    Raises:
        BadInput: the command cannot be understood, the mode does not fit it, or the model's
            vocabulary is unknown.
        ToolMissing: no nsys, or the command's program is not there.
    """
    out_dir = request.out_dir.absolute()  # nsys's agent has its own working directory
    server = read_command(request.command, request.engine, request.url)
    model_dir = request.model_dir or (model_folder(server.model) if server.model else None)
    waves = (request.waves or DEFAULT_WAVES) * _rounds(model_dir, request.op)
    asked = replace(request, out_dir=out_dir, waves=waves)
    mode = asked.mode or (Mode.SERVER if server.engine is not None else Mode.PROGRAM)
    try:
        nsys = find_nsys()
    except ToolMissing:
        if not dry_run:
            raise
        nsys = Nsys(Path("nsys"), "")
    plan = build_plan(asked, server, nsys.path, mode)
    if model_dir is None and server.engine is not None and not dry_run:
        raise BadInput(
            f"the config.json of the model ({server.model or 'not in the command'}) was not found: "
            "prompts are token ids, so its vocabulary must be known",
            "give the folder with --model",
        )
    if not dry_run:
        _require_program(server)
    return E2EPlan(plan, asked, server, mode, model_dir, nsys)


def _rounds(model_dir: Path | None, op: str) -> int:
    """How often all waves are sent, for a model of few layers to show enough regions of a shape.

    A prompt is one step, a region a layer; found by sequence, the first layer has none.
    """
    if model_dir is None or not (model_dir / "config.json").is_file():
        return 1
    config = _read_config(model_dir)
    config = {**config, **(config.get("text_config") or {})}
    layers = config.get("num_hidden_layers") or REGIONS + 1
    routed = bool(op) and find_op(op).routed
    dense = config.get("first_k_dense_replace") or 0 if routed else 0
    return int(-(-REGIONS // max(1, layers - dense - 1)))


def _require_program(server: ServerCommand) -> None:
    """nsys would start first and report this in many lines."""
    program = server.argv[0]
    if shutil.which(program, path=server.env.get("PATH")) is None:
        raise ToolMissing(
            f"{program}: no such program", "is the environment that has it the active one?"
        )


def run_e2e(e2e: E2EPlan, progress: Progress, grace: Grace | None = None) -> list[Path]:
    """Run the plan; return the new reports, each with its sidecar manifest beside it.

    Raises:
        ToolMissing, BadInput, RunFailed, KeyboardInterrupt: see :func:`perform`. Nothing that was
            started is left running.
    """
    config = _read_config(e2e.model_dir) if e2e.model_dir is not None else {}
    client = client_of(e2e) if e2e.server.engine is not None else None
    outcome = perform(e2e.plan, progress, client, e2e.request.seed, grace)
    manifest = _manifest(e2e, config, outcome)
    for report in e2e.plan.reports:
        manifest.write(sidecar_of(report))
    return list(e2e.plan.reports)


def client_of(e2e: E2EPlan) -> Client:
    """Who asks the plan's server.

    Raises:
        BadInput: the model's vocabulary is unknown.
    """
    assert e2e.server.engine is not None, "a program is not asked"
    config = _read_config(e2e.model_dir) if e2e.model_dir is not None else {}
    vocab = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(vocab, int) or vocab < 2:
        raise BadInput(f"{e2e.model_dir}/config.json has no vocab_size")
    server = e2e.server
    return Client(e2e.server.engine, server.url, vocab, server.served_name, server.api_key)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: not a model configuration")
    return config


def _manifest(e2e: E2EPlan, config: dict[str, Any], outcome: Outcome) -> Manifest:
    engine = e2e.server.engine
    versions = {"opkit": __version__, "nsys": e2e.nsys.version}
    if engine is not None and outcome.engine_version:
        versions[engine.name] = outcome.engine_version
    model: dict[str, Any] = {}
    if e2e.model_dir is not None:
        model = {
            "name": e2e.server.model or e2e.model_dir.name,
            "architecture": next(iter(config.get("architectures") or []), ""),
            "num_heads": config.get("num_attention_heads"),
            "hidden_size": config.get("hidden_size"),
            "num_hidden_layers": config.get("num_hidden_layers"),
            "config_sha256": file_digest(e2e.model_dir / "config.json"),
        }
    return Manifest(
        side="e2e",
        op=e2e.request.op,
        backend=engine.name if engine is not None else "torch",
        command=e2e.server.shown(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions,
        model=model,
        tp_size=e2e.server.tp_size,
        waves=e2e.request.waves if engine is not None else (),
        seed=e2e.request.seed,
        answers=tuple(outcome.answers),
        notes=(
            f"mode {e2e.mode}, recorded from {e2e.request.window}",
            *e2e.plan.notes,
            *outcome.notes,
        ),
    )
