"""A run of the engine, not timed and not profiled, that stores the inputs of an op's modules."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from opkit.align.profile.command_line import ServerCommand, model_folder
from opkit.align.profile.e2e import E2EPlan, client_of
from opkit.align.profile.perform import perform
from opkit.align.profile.plan import Command, End, Post, ProfilePlan, Purpose, Ready, Send, Start
from opkit.align.profile.process import Grace, Progress
from opkit.align.profile.target import with_opkit
from opkit.errors import BadInput, RunFailed
from opkit.layers.captured import read_info
from opkit.layers.op import Op
from opkit.layers.provenance import file_digest

_EXTENSION = "opkit_in_server.CaptureExtension"
# Hooks run in eager steps only; a prompt whose beginning is cached would not be computed whole.
_FLAGS = ("--worker-extension-cls", _EXTENSION, "--enforce-eager", "--no-enable-prefix-caching")
_WRITE_LIMIT_S = 600.0


def plan_capture(e2e: E2EPlan, op: Op, layer: int, folder: Path) -> ProfilePlan:
    """The steps of a capturing run, for the same command and waves.

    Raises:
        BadInput: only vLLM's server can be asked to store inputs, by flags of its own.
    """
    server, engine = e2e.server, e2e.server.engine
    if engine is None or engine.name != "vllm":
        name = engine.name if engine else "this command"
        raise BadInput(
            f"inputs are captured by a worker extension of vLLM, and {name} has none",
            "docs/models.md tells what each backend can capture",
        )
    if not server.recognised:
        raise BadInput(
            "the command hides vLLM's flags, so its server cannot be made to store inputs",
            "give the command itself, as in --e2e-cmd 'vllm serve …'",
        )
    if server.tp_size > 1:
        raise BadInput(
            f"inputs are captured of one rank, and this server has {server.tp_size}",
            "capture with a command of one rank, or use --inputs tokens",
        )
    argv = (*server.argv, *_FLAGS)
    # The server's interpreter must find opkit; with the dev mode on, it can be asked to call it.
    env = with_opkit({**server.env, **e2e.request.env})
    env |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    rpc = f"{server.url}/collective_rpc"
    start = {"method": "opkit_capture_start", "args": [_spec(e2e, op, layer, folder)]}
    url = server.url + engine.completions
    return ProfilePlan(
        steps=(
            Start(Command(argv, "start the server to capture the op's inputs", env)),
            Ready(server.url + engine.health, e2e.request.ready_limit_s),
            Post(rpc, "store the op's inputs from here on", json.dumps(start)),
            Send(url, e2e.request.waves, Purpose.RECORD, e2e.request.wave_limit_s),
            Post(rpc, "write them", json.dumps({"method": "opkit_capture_stop"}), _WRITE_LIMIT_S),
            End(),
        ),
        reports=(),
        log=e2e.request.out_dir / "capture.log",
        nsys=e2e.nsys.path,
        sessions=(),
    )


def run_capture(
    e2e: E2EPlan,
    op: Op,
    layer: int,
    folder: Path,
    progress: Progress,
    grace: Grace | None = None,
) -> None:
    """Run the engine once and leave the inputs of ``op`` in ``folder``.

    Raises:
        BadInput, RunFailed, ToolMissing, KeyboardInterrupt: see :func:`perform`; also when the run
            stored nothing.
    """
    plan = plan_capture(e2e, op, layer, folder)
    told = folder / "capture.json"
    told.unlink(missing_ok=True)
    perform(plan, progress, client_of(e2e), e2e.request.seed, grace)
    if not told.is_file() or not read_info(folder).lengths:
        raise RunFailed(f"no inputs of {op.name} were stored", f"the server's log: {plan.log}")


def _spec(e2e: E2EPlan, op: Op, layer: int, folder: Path) -> str:
    model = e2e.model_dir or model_folder(e2e.server.model)
    return json.dumps(
        {
            "op": op.name,
            "backend": "vllm",
            "layer": layer,
            "seed": e2e.request.seed,
            "model_sha256": file_digest(model / "config.json") if model else "",
            "command": _shown(e2e.server),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "region": op.region["vllm"].module,
            "folder": str(folder.absolute()),
        }
    )


def _shown(server: ServerCommand) -> str:
    return " ".join(server.shown())
