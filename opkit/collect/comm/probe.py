"""What an interpreter has: ``python -m opkit.collect.comm.probe DEVICE ENGINE`` prints one line.

Run before any rank, so that what is missing is one sentence instead of a dead world.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from opkit.collect.comm.backends import require_engine
from opkit.collect.workers.faults import describe
from opkit.errors import ToolMissing

MARK = "opkit-probe: "  # frameworks write to stdout when they are imported


def probe(device: str, engine: str) -> dict[str, Any]:
    """Versions, and the GPUs in the order of their ranks.

    Args:
        device: ``cuda`` or ``cpu``.
        engine: ``vllm``, ``trtllm``, or empty.

    Raises:
        ToolMissing: torch, its NCCL or gloo, a GPU, or the engine is not there.
    """
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation fails in many ways
        raise ToolMissing(
            f"collectives need torch, which cannot be imported here ({describe(error)})",
            "install it, or name an interpreter that has it with --python",
        ) from error
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    if device == "cpu":
        if not torch.distributed.is_gloo_available():
            raise ToolMissing(f"torch {torch.__version__} here was built without gloo")
        return found
    if not torch.distributed.is_nccl_available() or not torch.cuda.is_available():
        raise ToolMissing(
            f"torch {torch.__version__} here finds no GPU that it can use, or has no NCCL",
            "--device cpu tries everything but the numbers, with gloo",
        )
    found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    found["gpus"] = [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    if engine:
        found["engine"] = require_engine(engine)
    return found


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    uuid = str(getattr(properties, "uuid", ""))
    # torch leaves out the prefix.
    full = uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return {"index": index, "uuid": full, "name": properties.name}


def main() -> None:
    """Entry point: the answer, or what is missing, as JSON after :data:`MARK`."""
    try:
        answer = probe(sys.argv[1], sys.argv[2])
    except ToolMissing as error:
        answer = {"missing": str(error), "hint": error.hint}
    print(MARK + json.dumps(answer))


if __name__ == "__main__":
    main()
