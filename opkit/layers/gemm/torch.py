"""The gemm mocks of plain torch: single products, and the linear layers of a dense decoder layer.

They run on a GPU, or on the CPU where there is none. A single product is ``linear`` for bfloat16,
``_scaled_mm`` for float8. One weight and one activation tensor are kept, for the case in hand; they
are drawn again only when a case needs others.

There is one weight, not several in turn: whether it lies in L2 when an iteration begins is for the
timing to say (``l2``), in one place for all ops.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch

from opkit.errors import BadInput
from opkit.layers.backends.torch.draw import Inputs, Weights
from opkit.layers.backends.torch.launch import refuse_engines, versions
from opkit.layers.backends.torch.mock import TorchMock
from opkit.layers.gemm import DTYPES, LINEARS
from opkit.layers.graphs import CaptureFailed, Launcher
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import Forward, Probe
from opkit.layers.op import AnyCase, Case, GemmCase, LaunchMode
from opkit.layers.operands import sample
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import base_versions, op_digests, source_digests

WEIGHT_DEVIATION = 0.02  # how models draw their linear layers at the start of training
# There are no tokens in a product: their rows, and those of a normal distribution, are the same.
_NORMAL = "normal(0, 1), the same way; the first m rows of one tensor a k"
_ACTIVATIONS = {
    "tokens": _NORMAL,
    "normal": _NORMAL,
    "zeros": "zeros: degenerate on purpose",
    "rows": "all rows equal: degenerate on purpose",
}
_FP8 = torch.float8_e4m3fn
_FP8_MULTIPLE = 16  # torch._scaled_mm needs n and k in multiples of it
_FP8_CAPABILITY = (8, 9)  # Ada: the first GPUs whose tensor cores multiply float8


class GemmMock:
    """Single products; see :class:`opkit.layers.mock.Mock`.

    Raises:
        BadInput: the plan asks for what only a serving engine has.
    """

    def __init__(self, plan: Plan) -> None:
        refuse_engines(plan)
        self.plan = plan
        self._case: GemmCase | None = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._launcher = Launcher()
        self._weight: tuple[Any, Any, Any] = (None, None, None)  # key, values, scale
        self._activations: tuple[Any, Any, Any] = (None, None, None)
        self._rows: dict[tuple[int, str], int] = {}  # most rows of any case, by k and dtype
        for planned in plan.cases:
            case = planned.case
            key = (case.k, case.dtype)
            self._rows[key] = max(case.m, self._rows.get(key, 0))

    def prepare(self, planned: PlannedCase[GemmCase]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`.

        Raises:
            BadInput: torch has no product of these element types or sizes on this device.
            CaptureFailed: a graph was asked for and cannot be had, as on a CPU.
        """
        self._launcher.free()
        case = planned.case
        self._check(case)
        if planned.mode is LaunchMode.GRAPH and self.device.type == "cpu":
            raise CaptureFailed("a CPU has no CUDA graphs")
        activations, activation_scale, weight, weight_scale = self._operands(case)
        self._case = case
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

        return self._launcher.launch(forward, planned.mode)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`; float8 operands also give bfloat16.

        Raises:
            RuntimeError: no case was prepared.
        """
        if self._case is None:
            raise RuntimeError("probe() needs a prepared case")
        activations = self._operands(self._case)[0]
        return Probe({"input": activations}, (self._case.m, self._case.n), "bfloat16")

    def operands(self, planned: PlannedCase[GemmCase]) -> tuple[Operand, ...]:
        """The weight and the activations of a case."""
        activations, _, weight, _ = self._operands(planned.case)
        return sample("weight", weight), sample("input", activations)

    def describe(self) -> Manifest:
        """Versions, element types, sources and the recipe of inputs."""
        dtypes = ", ".join(sorted({planned.case.dtype for planned in self.plan.cases}))
        return Manifest(
            side="mock",
            op=self.plan.op,
            backend=self.plan.backend,
            command=tuple(sys.argv),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={**base_versions(), **versions(self.device)},
            dtypes={"weights": dtypes, "activations": dtypes, "output": "bfloat16"},
            tp_size=self.plan.tp_size,
            layer_source=source_digests((GemmMock,), ("opkit",)) | op_digests("gemm", "torch"),
            recipe={
                "weights": f"normal(0, {WEIGHT_DEVIATION}), torch.Generator of seed "
                f"{self.plan.seed}, role and shape; one tensor, used by every iteration",
                "activations": _ACTIVATIONS[self.plan.inputs],
                "float8": "bfloat16 values over their largest times 448, one scale a tensor; the "
                "op is the product alone, without quantising its input; fast accumulation",
            },
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._launcher.free()
        self._weight = self._activations = (None, None, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        if role == "activations" and self.plan.inputs == "zeros":
            values.zero_()
        if role == "activations" and self.plan.inputs == "rows":
            values[:] = values[0].clone()
        if case.dtype == "bfloat16":
            return values, None
        scale = values.abs().max().float() / torch.finfo(_FP8).max
        scale = torch.where(scale > 0, scale, 1.0)  # zeros have no largest value
        return (values / scale.to(values.dtype)).to(_FP8), scale


class LinearsMock(TorchMock):
    """All linear layers of a dense layer, in order; see :class:`opkit.layers.mock.Mock`.

    Each has an input of its own: what stands between them is no part of the op. A forward returns
    what the last of them gives; ``outputs`` holds all.
    """

    outputs: tuple[Any, ...] = ()

    def require(self) -> None:
        """See :meth:`TorchMock.require`."""
        if self.geometry.latent is not None or self.geometry.experts is not None:
            raise BadInput(
                f"{self.origin}: the op gemm is a dense layer's ({', '.join(LINEARS)})",
                "a latent attention's products are part of mla and dsa, experts' of moe",
            )

    def build(self) -> Any:
        """See :meth:`TorchMock.build`."""
        self.weights = Weights(self.plan.seed, self.device, self.dtype, "normal_0.02")
        layer = torch.nn.Module()
        for path, (outputs, inputs) in self._sizes().items():
            parent, _, name = path.rpartition(".")
            if not hasattr(layer, parent):
                layer.add_module(parent, torch.nn.Module())
            layer.get_submodule(parent).add_module(name, self.weights.linear(path, inputs, outputs))
        self._linears = {path: layer.get_submodule(path) for path in LINEARS}
        return layer

    def build_inputs(self) -> Inputs:
        """Where each layer's activations come from."""
        self._inputs = {path: self._drawn(size[1], path) for path, size in self._sizes().items()}
        return self._inputs[LINEARS[0]]

    def load(self, case: AnyCase) -> None:
        """See :meth:`TorchMock.load`."""
        assert isinstance(case, Case)
        self.inputs = {
            path: drawn.rows(range(case.batch), case.past, case.tokens)
            for path, drawn in self._inputs.items()
        }

    def launch(self) -> Any:
        """See :meth:`TorchMock.launch`."""
        self.outputs = tuple(linear(self.inputs[path]) for path, linear in self._linears.items())
        return self.outputs[-1]

    def model(self) -> dict[str, Any]:
        """See :meth:`TorchMock.model`."""
        linears = {path: list(size) for path, size in self._sizes().items()}
        return {"hidden_size": self.geometry.hidden_size, "linears": linears}

    def elements(self) -> int:
        """See :meth:`TorchMock.elements`."""
        return sum(outputs * inputs for outputs, inputs in self._sizes().values())

    def notes(self) -> tuple[str, ...]:
        """See :meth:`TorchMock.notes`."""
        return ("the bias of qkv_proj is left out",) if self.geometry.qkv_bias else ()

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Output and input features of each layer, by its name."""
        shape = self.geometry
        attended = shape.heads * shape.head_dim
        sizes = (
            (attended + 2 * shape.kv_heads * shape.head_dim, shape.hidden_size),
            (shape.hidden_size, attended),
            (2 * shape.intermediate_size, shape.hidden_size),
            (shape.hidden_size, shape.intermediate_size),
        )
        return dict(zip(LINEARS, sizes, strict=True))


class BothMock:
    """Single products beside a layer's linear layers; see :class:`opkit.layers.mock.Mock`."""

    def __init__(self, products: GemmMock, linears: LinearsMock) -> None:
        self._products, self._linears = products, linears
        self._last: GemmMock | LinearsMock = linears

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`."""
        self._last = self._of(planned)
        return self._last.prepare(planned)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`."""
        return self._last.probe()

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`."""
        return self._of(planned).operands(planned)

    def describe(self) -> Manifest:
        """The layer's manifest, with the element types and the recipe of the products."""
        layer, products = self._linears.describe(), self._products.describe()
        own = {f"products: {name}": text for name, text in products.recipe.items()}
        dtypes = {
            role: ", ".join(dict.fromkeys([name, *products.dtypes.get(role, name).split(", ")]))
            for role, name in layer.dtypes.items()
        }
        return dataclasses.replace(layer, dtypes=dtypes, recipe={**layer.recipe, **own})

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._products.close()
        self._linears.close()

    def _of(self, planned: PlannedCase[Any]) -> GemmMock | LinearsMock:
        return self._products if isinstance(planned.case, GemmCase) else self._linears


def build(plan: Plan, dtype: str | None = None) -> GemmMock | LinearsMock | BothMock:
    """Build the mock that ``plan`` asks for: of single products, of a layer's linear layers, or of
    both.

    Args:
        plan: a plan of products alone needs no model.
        dtype: element type instead of the model's, of a layer's linear layers; for tests.

    Raises:
        BadInput: see the mocks.
    """
    products = tuple(item for item in plan.cases if isinstance(item.case, GemmCase))
    steps = tuple(item for item in plan.cases if not isinstance(item.case, GemmCase))
    if not steps:
        return GemmMock(plan)
    linears = LinearsMock(dataclasses.replace(plan, cases=steps), dtype)
    if not products:
        return linears
    return BothMock(GemmMock(dataclasses.replace(plan, cases=products)), linears)
