"""The gemm mock of plain torch: ``linear`` for bfloat16, ``_scaled_mm`` for float8.

Runs on a GPU, or on the CPU where there is none. One weight and one activation tensor are kept, for
the case in hand; they are drawn again only when a case needs others.

There is one weight, not several in turn: whether it lies in L2 when an iteration begins is for the
timing to say (``l2``), in one place for all ops.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from opkit.errors import BadInput
from opkit.layers.gemm import DTYPES
from opkit.layers.graphs import CapturedGraph, CaptureFailed
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.op import GemmCase, LaunchMode
from opkit.layers.operands import sample
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import base_versions, source_digests

WEIGHT_DEVIATION = 0.02  # how models draw their linear layers at the start of training
_FP8 = torch.float8_e4m3fn
_FP8_MULTIPLE = 16  # torch._scaled_mm needs n and k in multiples of it
_FP8_CAPABILITY = (8, 9)  # Ada: the first GPUs whose tensor cores multiply float8


class GemmMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._graph: CapturedGraph | None = None
        self._weight: tuple[Any, Any, Any] = (None, None, None)  # key, values, scale
        self._activations: tuple[Any, Any, Any] = (None, None, None)
        self._rows: dict[tuple[int, str], int] = {}  # most rows of any case, by k and dtype
        for planned in plan.cases:
            case = planned.case
            key = (case.k, case.dtype)
            self._rows[key] = max(case.m, self._rows.get(key, 0))

    def prepare(self, planned: PlannedCase[GemmCase]) -> Callable[[], Any]:
        """See :meth:`opkit.layers.mock.Mock.prepare`.

        Raises:
            BadInput: torch has no product of these element types or sizes on this device.
            CaptureFailed: a graph was asked for and cannot be had, as on a CPU.
        """
        self._drop_graph()
        case = planned.case
        self._check(case)
        if planned.mode is LaunchMode.GRAPH and self.device.type == "cpu":
            raise CaptureFailed("a CPU has no CUDA graphs")
        activations, activation_scale, weight, weight_scale = self._operands(case)
        forward: Callable[[], Any]
        if case.dtype == "bfloat16":

            def forward() -> Any:
                return torch.nn.functional.linear(activations, weight)

        else:
            transposed = weight.t()

            def forward() -> Any:
                # Fast accumulation is what engines use to infer.
                return torch._scaled_mm(
                    activations,
                    transposed,
                    activation_scale,
                    weight_scale,
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )

        if planned.mode is LaunchMode.GRAPH:
            self._graph = CapturedGraph(forward)
            return self._graph
        return forward

    def operands(self, planned: PlannedCase[GemmCase]) -> tuple[Operand, ...]:
        """The weight and the activations of a case."""
        activations, _, weight, _ = self._operands(planned.case)
        return sample("weight", weight), sample("input", activations)

    def describe(self) -> Manifest:
        """Versions, element types, sources and the recipe of inputs."""
        dtypes = ", ".join(sorted({planned.case.dtype for planned in self.plan.cases}))
        cuda = {"cuda": str(torch.version.cuda)} if self.device.type == "cuda" else {}
        gpu = {"gpu": torch.cuda.get_device_name()} if self.device.type == "cuda" else {}
        return Manifest(
            side="mock",
            op=self.plan.op,
            backend=self.plan.backend,
            command=tuple(sys.argv),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={**base_versions(), "torch": torch.__version__, **cuda, **gpu},
            dtypes={"weights": dtypes, "activations": dtypes, "output": "bfloat16"},
            tp_size=self.plan.tp_size,
            layer_source=source_digests((GemmMock,), ("opkit",)),
            recipe={
                "weights": f"normal(0, {WEIGHT_DEVIATION}), torch.Generator of seed "
                f"{self.plan.seed}, role and shape; one tensor, used by every iteration",
                "activations": "normal(0, 1), the same way; the first m rows of one tensor a k",
                "float8": "bfloat16 values over their largest times 448, one scale a tensor; the "
                "op is the product alone, without quantising its input; fast accumulation",
            },
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._drop_graph()
        self._weight = self._activations = (None, None, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _drop_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.free()

    def _check(self, case: GemmCase) -> None:
        """Raise BadInput when torch cannot compute ``case`` on this device."""
        if case.dtype not in DTYPES:
            raise BadInput(f"gemm has no element type {case.dtype!r}; known: {', '.join(DTYPES)}")
        if case.dtype == "bfloat16":
            return
        if self.device.type == "cuda" and torch.cuda.get_device_capability() < _FP8_CAPABILITY:
            raise BadInput(f"{torch.cuda.get_device_name()} multiplies no float8")
        if case.n % _FP8_MULTIPLE or case.k % _FP8_MULTIPLE:
            raise BadInput(f"{case.label()}: n and k must be multiples of {_FP8_MULTIPLE}")

    def _operands(self, case: GemmCase) -> tuple[Any, Any, Any, Any]:
        """Activations [m, k] and their scale, weight [n, k] and its scale; made when needed."""
        key = (case.n, case.k, case.dtype)
        if self._weight[0] != key:
            self._weight = (None, None, None)  # freed before the next is made
            self._weight = (key, *self._draw("weight", case.n, case, WEIGHT_DEVIATION))
        rows = max(case.m, self._rows.get((case.k, case.dtype), 0))
        wanted = (rows, case.k, case.dtype)
        if self._activations[0] != wanted:
            self._activations = (None, None, None)
            self._activations = (wanted, *self._draw("activations", rows, case, 1.0))
        _, activations, activation_scale = self._activations
        _, weight, weight_scale = self._weight
        return activations[: case.m], activation_scale, weight, weight_scale

    def _draw(self, role: str, rows: int, case: GemmCase, deviation: float) -> tuple[Any, Any]:
        """Normal values [rows, k] in the case's element type, and their scale (float32 scalar).

        Which values depends on nothing but the plan's seed, the role and the shape.
        """
        text = f"opkit gemm {self.plan.seed} {role} {rows} {case.k}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        stream = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(
            rows, case.k, generator=stream, dtype=torch.bfloat16, device=self.device
        ).mul_(deviation)
        if case.dtype == "bfloat16":
            return values, None
        scale = values.abs().max().float() / torch.finfo(_FP8).max
        return (values / scale.to(values.dtype)).to(_FP8), scale


def build(plan: Plan) -> GemmMock:
    """Build the mock that ``plan`` asks for; see :class:`GemmMock`."""
    return GemmMock(plan)
