"""The process that nsys profiles: builds a mock and runs each planned case in NVTX ranges.

    nsys profile --capture-range=cudaProfilerApi --capture-range-end=stop -t cuda,nvtx \\
        --cuda-graph-trace=node -o mock python -m opkit.layers.drive plan.json

Without a GPU (a mock of torch on the CPU) there is no window: nsys records the whole process, and
what runs before the measured iterations runs in no range of opkit's.

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
from opkit.layers import nvtx, progress
from opkit.layers.manifest import Operand
from opkit.layers.mock import Forward, Mock
from opkit.layers.op import AnyCase, Case, GemmCase, MockRange, MoeCase, Phase
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
    progress.listen(_progress)
    _progress(f"building the {plan.backend} mock of {op.name}")
    mock = build_mock(op, plan.backend, plan)
    torch = _torch()
    device = _Gpu(torch) if torch.cuda.is_available() else _Cpu()
    marked = nvtx.marker(torch, _progress)
    # Kernels are compiled and chosen at first use: outside the window, and for all cases.
    for planned in plan.cases:
        _progress(f"first run {_label(planned)}")
        mock.prepare(planned)()
        device.wait()
    described = dataclasses.replace(mock.describe(), operands=_operands(plan, mock))
    device.open_window()
    for planned in plan.cases:
        _measure(plan, planned, mock.prepare(planned), device, marked)
    recipe = {**described.recipe, "inputs": plan.inputs, "pacing": _pacing(plan)}
    # Before the window closes: nsys may be told to end this process with it.
    dataclasses.replace(described, recipe=recipe).write(manifest)
    device.close_window()
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


class _Cpu:
    """Where there is no GPU: nothing to wait for, no window, no L2 to sweep."""

    def wait(self) -> None:
        """Return when all that was launched has ended."""

    def open_window(self) -> None:
        """Begin what nsys records."""

    def close_window(self) -> None:
        """End what nsys records."""

    def sweep_buffer(self) -> Any:
        """See :meth:`_Gpu.sweep_buffer`."""
        return None


class _Gpu(_Cpu):
    """The same on a GPU, by torch."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def wait(self) -> None:
        self._torch.cuda.synchronize()

    def open_window(self) -> None:
        self._torch.cuda.profiler.start()

    def close_window(self) -> None:
        self._torch.cuda.profiler.stop()

    def sweep_buffer(self) -> Any:
        """Memory of twice the L2 cache, read before each iteration as an engine's other layers
        read it.

        Whether reading leaves L2 cold is not established: on an H100 it changed no kernel by more
        than about 3 %. Writing instead slows the first GEMMs by 1.2 to 1.36 times
        (``docs/development.md``).
        """
        torch = self._torch
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return torch.zeros(2 * size // 4, dtype=torch.float32, device="cuda")  # 4 bytes an element


def _measure(
    plan: Plan, planned: PlannedCase[Any], forward: Forward, device: _Cpu, marked: nvtx.Marked
) -> None:
    """Warm up, then run the measured iterations, each in its range and awaited."""
    _progress(f"measuring {_label(planned)}: {plan.iterations} iterations")
    # Cases without a phase are paced as a prefill is: bursts.
    pause = plan.pause_s(getattr(planned.case, "phase", Phase.CONTEXT))
    variant = "strict" if plan.strict else "mock"
    sweep = None if plan.l2 == "left" else device.sweep_buffer()
    for _ in range(plan.warmup):
        forward()
        device.wait()
        time.sleep(pause)
    for iteration in range(plan.iterations):
        if sweep is not None:
            sweep.sum()
        with marked(MockRange(plan.op, planned.case, planned.mode, iteration, variant).text()):
            forward()
        device.wait()
        time.sleep(pause)


def _operands(plan: Plan, mock: Mock) -> tuple[Operand, ...]:
    """Operands sampled in the first case of each kind; weights are the same in all of them."""
    firsts: dict[str, PlannedCase[Any]] = {}
    for planned in plan.cases:
        firsts.setdefault(_kind(planned.case), planned)
    found: dict[str, Operand] = {}
    for planned in firsts.values():
        found.update({operand.name: operand for operand in mock.operands(planned)})
    return tuple(found.values())


def _kind(case: AnyCase) -> str:
    """A phase, an element type or a routing: what the values of operands may follow."""
    if isinstance(case, GemmCase):
        return case.dtype
    return case.routing if isinstance(case, MoeCase) else case.phase


def _pacing(plan: Plan) -> str:
    """How the iterations follow one another, for the manifest."""
    return (
        f"{plan.warmup} warm-up and {plan.iterations} measured iterations a case, each awaited; "
        f"pause {plan.context_pause_ms:g} ms in context, {plan.generation_pause_ms:g} ms in "
        f"generation; L2 {plan.l2} before each iteration"
    )


def _label(planned: PlannedCase[Any]) -> str:
    """A case in a progress line."""
    phase = f"{planned.case.phase} " if isinstance(planned.case, Case) else ""
    return f"{phase}{planned.case.label()} ({planned.mode})"


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
