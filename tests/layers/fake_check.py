"""Stands in for the interpreter of a check: says and does what ``FAKE_CHECK`` names.

Called as ``PYTHON -P -c CODE FOLDER opkit.layers.check PLAN.json PARENT``; anything else is given
to the real interpreter.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    if "opkit.layers.check" not in sys.argv:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    from opkit.layers.check.asked import read_check_plan
    from opkit.layers.check.result import CheckResult, Line, Outcome

    plan = read_check_plan(Path(sys.argv[-2]))
    assert int(sys.argv[-1]) == os.getppid()
    deed = os.environ.get("FAKE_CHECK", "pass")
    print("a warning of some library", file=sys.stderr)
    print("opkit check: building", file=sys.stderr, flush=True)

    def found(outcome: Outcome, complete: bool) -> None:
        lines = (
            Line("forward", Outcome.PASS, "context 1 × 64 ran"),
            Line("repeatable", outcome, "as it is", "the cause", "the fix",
                 {"context": {"relative_error": float("inf")}}),
            Line("CUDA graph", Outcome.NOT_APPLICABLE, "no GPU here"),
        )  # fmt: skip
        running = "" if complete else "context 1 × 64"
        mock = {"versions": {"torch": "2.13.0"}, "model": {"architecture": "Qwen3ForCausalLM"}}
        CheckResult(
            plan.op, plan.backend, "cpu", plan.inputs, mock, lines, 1.0, running, complete
        ).write(Path(plan.result))

    match deed:
        case "pass" | "fail":
            found(Outcome(deed), complete=True)
        case "refuse":
            print("opkit check: the model has no experts", file=sys.stderr)
            print("  give one that has", file=sys.stderr)
            return 4
        case "crash":
            found(Outcome.NOT_RUN, complete=False)
            print("opkit check: context: context 1 × 64", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "die":
            print("Fatal Python error: out of luck", file=sys.stderr, flush=True)
            return 1
        case "hang":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            time.sleep(60)
        case "deaf":
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            print("opkit check: deaf", file=sys.stderr, flush=True)
            time.sleep(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
