"""The process that holds an engine: commands from stdin, answers to a descriptor, as JSON lines.

Run as ``python worker.py FD``. Whatever the engine prints goes to stderr. It ends when told to, and
when stdin closes: then opkit is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

SHOWN = 400  # characters of an error that is told whole
ENGINES = {"vllm": "engine_vllm", "trtllm": "engine_trtllm"}


def main() -> None:
    """Answer commands until the end."""
    here = os.path.dirname(os.path.abspath(__file__))
    if here not in sys.path:  # PYTHONSAFEPATH leaves a script's folder out
        sys.path.insert(0, here)
    out = os.fdopen(int(sys.argv[1]), "w")
    os.set_inheritable(out.fileno(), False)  # the engine's processes would keep it open
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "end":
            break
        told: dict[str, Any]
        try:
            if command["do"] == "start":
                engine = importlib.import_module(ENGINES[command["backend"]]).start(
                    command["options"]
                )
                told = {"served": engine.served}
            else:
                told = {"turn": engine.generate(command["prompts"], command["output"])}
        except (Exception, SystemExit) as error:  # engines call sys.exit
            traceback.print_exc()
            told = {"error": sentence(error), "kind": type(error).__name__}
        out.write(json.dumps(told, default=str) + "\n")
        out.flush()
    if engine is not None:
        engine.close()


def sentence(error: BaseException) -> str:
    """The error's first line; pydantic's first lines name no cause, so all of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and "validation error" in lines[0]:
        lines[0] = "; ".join(lines)[:SHOWN]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
