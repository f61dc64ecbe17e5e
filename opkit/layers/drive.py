"""The process that nsys profiles: builds a mock and runs each planned case in NVTX ranges.

    nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop -t cuda,nvtx \\
        --cuda-graph-trace=node -o mock python -m opkit.layers.drive plan.json

Progress and errors go to stderr. A failure is one sentence and an exit code of ``opkit.errors``;
its traceback goes to a file beside the manifest, and to stderr when ``OPKIT_DEBUG=1``.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opkit.errors import EXIT_INTERRUPTED, EXIT_USAGE, BadInput, OpkitError, RunFailed
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Mock
from opkit.layers.op import MockRange, Phase
from opkit.layers.plan import Plan, PlannedCase, read_plan
from opkit.layers.registry import build_mock, find_op


def drive(plan: Plan) -> None:
    """Run every case of ``plan`` and write the manifest.

    Raises:
        OpkitError: what went wrong, as a sentence.
    """
    op = find_op(plan.op)
    manifest = Path(plan.manifest)
    if not manifest.parent.is_dir():
        raise BadInput(f"{manifest.parent}: no such folder for the manifest")
    _progress(f"building the {plan.backend} mock of {op.name}")
    mock = build_mock(op, plan.backend, plan)
    torch = _torch()
    # Kernels are compiled and chosen at first use: outside the window, and for all cases.
    for planned in plan.cases:
        _progress(f"first run {_label(planned)}")
        mock.prepare(planned)()
        torch.cuda.synchronize()
    described = dataclasses.replace(mock.describe(), operands=_operands(plan, mock))
    torch.cuda.profiler.start()
    for planned in plan.cases:
        _measure(plan, planned, mock.prepare(planned), torch)
    recipe = {**described.recipe, "pacing": _pacing(plan)}
    # Before the window closes: nsys may be told to end this process with it.
    dataclasses.replace(described, recipe=recipe).write(manifest)
    torch.cuda.profiler.stop()
    mock.close()
    _progress(f"wrote {manifest}")


def run(work: Callable[[], None], trace: Path) -> int:
    """Do ``work``; tell a failure as one sentence and keep its traceback in ``trace``.

    Returns:
        0, or an exit code of :mod:`opkit.errors`.
    """
    try:
        work()
    except OpkitError as error:
        _keep_traceback(trace)
        return _tell(error)
    except KeyboardInterrupt:
        _progress("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        _keep_traceback(trace)
        reason = (str(error).strip() or "no message").splitlines()[0]
        return _tell(
            RunFailed(
                f"the mock failed: {type(error).__name__}: {reason}", hint=f"traceback: {trace}"
            )
        )
    return 0


def main(arguments: Sequence[str]) -> int:
    """``python -m opkit.layers.drive PLAN.json``."""
    faulthandler.enable()
    if len(arguments) != 1:
        print("usage: python -m opkit.layers.drive PLAN.json", file=sys.stderr)
        return EXIT_USAGE
    try:
        plan = read_plan(Path(arguments[0]))
    except OpkitError as error:
        return _tell(error)
    return run(lambda: drive(plan), traceback_file(plan))


def traceback_file(plan: Plan) -> Path:
    """Where a failure's traceback goes: beside the manifest."""
    return Path(plan.manifest).with_suffix(".traceback.txt")


def _measure(plan: Plan, planned: PlannedCase[Any], forward: Forward, torch: Any) -> None:
    """Warm up, then run the measured iterations, each in its range and awaited."""
    _progress(f"measuring {_label(planned)}: {plan.iterations} iterations")
    pause = plan.pause_s(planned.case.phase)
    variant = "strict" if plan.strict else "mock"
    sweep = _sweep_buffer(plan, torch)
    for _ in range(plan.warmup):
        forward()
        torch.cuda.synchronize()
        time.sleep(pause)
    for iteration in range(plan.iterations):
        marked = MockRange(plan.op, planned.case, planned.mode, iteration, variant)
        if sweep is not None:
            sweep.sum()
        torch.cuda.nvtx.range_push(marked.text())
        try:
            forward()
        finally:
            torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        time.sleep(pause)


def _sweep_buffer(plan: Plan, torch: Any) -> Any:
    """Memory of twice the L2 cache, read before each iteration as an engine's other layers read it.

    Whether reading leaves L2 cold is not established: on an H100 it changed no kernel by more than
    about 3 %. Writing instead slows the first GEMMs by 1.2 to 1.36 times (``docs/development.md``).
    """
    if plan.l2 == "left":
        return None
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return torch.zeros(2 * size // 4, dtype=torch.float32, device="cuda")  # 4 bytes an element


def _operands(plan: Plan, mock: Mock) -> tuple[Operand, ...]:
    """Operands sampled in the first case of each phase; weights are the same in both."""
    firsts: dict[Phase, PlannedCase[Any]] = {}
    for planned in plan.cases:
        firsts.setdefault(planned.case.phase, planned)
    found: dict[str, Operand] = {}
    for planned in firsts.values():
        found.update({operand.name: operand for operand in mock.operands(planned)})
    return tuple(found.values())


def _pacing(plan: Plan) -> str:
    """How the iterations follow one another, for the manifest."""
    return (
        f"{plan.warmup} warm-up and {plan.iterations} measured iterations a case, each awaited; "
        f"pause {plan.context_pause_ms:g} ms in context, {plan.generation_pause_ms:g} ms in "
        f"generation; L2 {plan.l2} before each iteration"
    )


def _label(planned: PlannedCase[Any]) -> str:
    """A case in a progress line."""
    return f"{planned.case.phase} {planned.case.label()} ({planned.mode})"


def _torch() -> Any:
    """torch, which the mock has already imported; ``align`` imports this module without it."""
    return importlib.import_module("torch")


def _keep_traceback(trace: Path) -> None:
    """Write the current exception's traceback to ``trace``; with OPKIT_DEBUG=1 also to stderr."""
    text = traceback.format_exc()
    try:
        trace.write_text(text)
    except OSError as error:
        _progress(f"the traceback could not be kept: {error}")
    if os.environ.get("OPKIT_DEBUG") == "1":
        print(text, file=sys.stderr)


def _tell(error: OpkitError) -> int:
    """Print the failure's sentence and hint; return its exit code."""
    print(f"opkit drive: {error}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)
    return error.exit_code


def _progress(message: str) -> None:
    """One line for whoever watches."""
    print(f"opkit drive: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
