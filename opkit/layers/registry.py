"""The ops that exist, and the mocks that can be built."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import cast

from opkit.errors import BadInput, ToolMissing
from opkit.layers.mock import Mock
from opkit.layers.op import Op
from opkit.layers.plan import Plan

# Every op: opkit/layers/NAME/__init__.py defines it as NAME in capitals. `opkit new` adds a line.
NAMES = (
    "dsa",
    "mla",
    "gqa",
    "moe",
    "gemm",
)
OPS: dict[str, Op] = {
    name: getattr(importlib.import_module(f"opkit.layers.{name}"), name.upper()) for name in NAMES
}
BACKENDS = ("vllm", "sglang", "trtllm", "torch")

# The mock of an op on a backend is ``build`` of opkit/layers/OP/BACKEND.py. A pair without that
# file has none; where a reason is known it stands here.
_MISSING: dict[tuple[str, str], str] = {}
INSTALL = {
    "torch": "pip install torch",
    "vllm": "pip install vllm==0.24.0 (on the GPU host, with its own torch)",
    "sglang": "pip install sglang==0.5.14 (on the GPU host, with its own torch)",
    "trtllm": "use NVIDIA's tensorrt-llm release container",
}


def find_op(name: str) -> Op:
    """The op that users call ``name``.

    Raises:
        BadInput: there is none; the message lists those that exist.
    """
    if name not in OPS:
        raise BadInput(f"unknown op {name!r}; known: {', '.join(sorted(OPS))}")
    return OPS[name]


def mock_backends(op: Op) -> list[str]:
    """The backends that have a mock of the op."""
    folder = Path(__file__).parent / op.name
    return [name for name in BACKENDS if (folder / f"{name}.py").is_file()]


def missing_mock(op: Op, backend: str) -> str:
    """Why there is no mock of the op for a backend."""
    return _MISSING.get((op.name, backend)) or f"not written (opkit/layers/{op.name}/{backend}.py)"


def require_mock(op: Op, backend: str) -> None:
    """Refuse a backend that has no mock of the op.

    Raises:
        BadInput: the message lists those that have one.
    """
    if backend not in mock_backends(op):
        known = ", ".join(mock_backends(op))
        why = missing_mock(op, backend) if backend in BACKENDS else None
        raise BadInput(f"no mock of {op.name} for {backend!r}; known: {known}", why)


def build_mock(op: Op, backend: str, plan: Plan) -> Mock:
    """Import the backend and build the mock that ``plan`` asks for.

    Raises:
        BadInput: opkit has no mock of this op for this backend.
        ToolMissing: the framework cannot be imported, or there is no GPU.
    """
    require_mock(op, backend)
    try:
        module = importlib.import_module(f"opkit.layers.{op.name}.{backend}")
    except ImportError as error:
        raise ToolMissing(
            f"the mock needs {backend}, which cannot be imported ({error})",
            hint=f"install it: {INSTALL[backend]}",
        ) from error
    return cast(Mock, module.build(plan))
