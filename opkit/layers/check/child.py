"""What the process of a check does: ``python -m opkit.layers.check PLAN.json``.

Builds the mock once, looks at it case by case, and writes the result after every case, so that a
crash costs the case in hand. Progress and errors go to stderr. Its exit code is 0 when every case
was looked at, whatever was found; else one of :mod:`opkit.errors`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opkit.errors import (
    EXIT_INTERRUPTED,
    EXIT_RUN_FAILED,
    EXIT_USAGE,
    BadInput,
    OpkitError,
    RunFailed,
    ToolMissing,
)
from opkit.layers import progress
from opkit.layers.captured import read_info
from opkit.layers.check.asked import CheckPlan, read_check_plan
from opkit.layers.check.cases import Asked, Role, cases_of, keeps_cache, sizes_for
from opkit.layers.check.facts import Observation, Seen
from opkit.layers.check.judge import judge
from opkit.layers.check.observe import inspect, sentence
from opkit.layers.check.result import CheckResult
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Manifest
from opkit.layers.mock import Mock
from opkit.layers.plan import Plan
from opkit.layers.registry import build_mock, find_op

SAYS = "opkit check: "  # what the parent shows of stderr
_PR_SET_PDEATHSIG = 1  # prctl(2)


def check(plan: CheckPlan) -> CheckResult:
    """Build the mock and run the whole checklist; writes the result as it grows.

    Raises:
        OpkitError: the mock cannot be built.
    """
    began = time.monotonic()
    op = find_op(plan.op)
    gpu = gpu_here()
    captured = read_info(Path(plan.captured)).lengths if plan.captured else None
    sizes = sizes_for(gpu, config_of(plan.model), captured)
    caches = keeps_cache(op)
    asked = cases_of(op, sizes, graphs=gpu, caches=caches)
    progress.listen(tell)
    tell(f"building the {plan.backend} mock of {op.name} for {len(asked)} cases")
    seen = Seen(op.name, plan.backend, "cuda" if gpu else "cpu", plan.inputs, caches, (), (), asked)
    mock = _build(plan, asked, seen)
    manifest = mock.describe()
    seen.activations = _words(manifest.dtypes.get("activations", ""))
    seen.cache_dtypes = _words(manifest.dtypes.get("kv_cache", ""))
    result = Path(plan.result)

    def found(running: str = "", complete: bool = False) -> CheckResult:
        made = CheckResult(
            op=seen.op,
            backend=seen.backend,
            device=seen.device,
            inputs=seen.inputs,
            mock=_described(manifest, seen),
            lines=judge(seen),
            seconds=time.monotonic() - began,
            running=running,
            complete=complete,
        )
        made.write(result)
        return made

    inspect(mock, seen, tell, before=found)
    done = found(complete=True)
    mock.close()
    return done


def _build(plan: CheckPlan, asked: Sequence[Asked], seen: Seen) -> Mock:
    """The mock with every case; without graphs, or the op's own cases, where they prevent it."""

    def build(cases: Sequence[Asked]) -> Mock:
        made = Plan(
            op=plan.op,
            backend=plan.backend,
            model=plan.model,
            cases=tuple(item.planned for item in cases),
            manifest=str(Path(plan.result).with_name("mock.opkit.json")),
            engine_args=plan.engine_args,
            tp_size=plan.tp_size,
            seed=plan.seed,
            inputs=plan.inputs,
            captured=plan.captured,
            limits="cases",
            caches="prefilled",
        )
        return build_mock(find_op(plan.op), plan.backend, made)

    remaining = list(asked)
    while True:
        try:
            return build(remaining)
        except (CaptureFailed, BadInput) as error:
            graphs = isinstance(error, CaptureFailed)
            roles = (Role.GRAPH, Role.MANY_GRAPH) if graphs else (Role.OWN,)
            dropped = [item for item in remaining if item.role in roles]
            if not dropped:
                raise
            traceback.print_exc()
            tell(f"{error}; building again without {', '.join(item.label() for item in dropped)}")
            uncaptured, refused = (str(error), "") if graphs else ("", str(error))
            seen.observations += [
                Observation(item, uncaptured=uncaptured, refused=refused) for item in dropped
            ]
            remaining = [item for item in remaining if item not in dropped]


def _described(manifest: Manifest, seen: Seen) -> dict[str, Any]:
    """The manifest as JSON, with the operands once they are sampled."""
    data = dataclasses.asdict(dataclasses.replace(manifest, operands=seen.operands or ()))
    return dict(json.loads(json.dumps(data, default=str)))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split() if word)


def config_of(model: str) -> dict[str, Any]:
    """The model's ``config.json``; empty where the mock has to complain about it."""
    try:
        data = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ToolMissing(
            f"a mock runs on torch, which cannot be imported ({error})",
            hint=f"pip install torch for {sys.executable}, or name an interpreter: --python",
        ) from error


def gpu_here() -> bool:
    """Whether torch sees a GPU.

    Raises:
        ToolMissing: no torch.
    """
    return bool(_torch().cuda.is_available())


def tell(message: str) -> None:
    """One line for whoever watches."""
    print(f"{SAYS}{message}", file=sys.stderr, flush=True)


def die_with(parent: int) -> None:
    """Have the kernel end this process, politely, when the one that started it goes.

    Args:
        parent: its process id.

    Raises:
        RunFailed: it has gone already, or the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise RunFailed(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise RunFailed("whoever started this check has gone")


def main(arguments: Sequence[str]) -> int:
    """``python -m opkit.layers.check PLAN.json [PARENT]``, the id of the process to end with."""
    if len(arguments) not in (1, 2):
        print("usage: python -m opkit.layers.check PLAN.json", file=sys.stderr)
        return EXIT_USAGE
    try:
        if len(arguments) == 2:
            die_with(int(arguments[1]))
        check(read_check_plan(Path(arguments[0])))
    except OpkitError as error:
        traceback.print_exc()
        tell(f"{error}")
        for line in (error.hint or "").splitlines():
            print(f"  {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        tell(f"the mock failed: {sentence(error)}")
        return EXIT_RUN_FAILED
    return 0
