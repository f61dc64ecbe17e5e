"""What all mocks of the torch backend share: device, inputs, caches, launch modes, the manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from opkit.errors import BadInput
from opkit.layers.backends.torch.draw import Inputs, Weights
from opkit.layers.backends.torch.launch import refuse_engines, versions
from opkit.layers.backends.torch.step import Step, make_step
from opkit.layers.geometry import geometry_of
from opkit.layers.graphs import CaptureFailed, Launcher
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import CacheView, Forward, Probe
from opkit.layers.model_config import read_config
from opkit.layers.op import AnyCase, Case, LaunchMode, MoeCase
from opkit.layers.operands import dtype_name, sample, watch
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.provenance import mock_manifest, source_digests

_PREFILL_ROWS = {"cuda": 8192, "cpu": 1024}  # tokens written into the caches at once
# Share of the memory that weights and caches may fill: the rest is for activations, and a host's is
# not this process's alone.
_ROOM = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True)
class CacheShape:
    """One cache of an op.

    Attributes:
        name: what it is called.
        entry: dimensions of one token's entry.
        window: tokens back that are read at all; 0: all.
    """

    name: str
    entry: tuple[int, ...]
    window: int = 0


class TorchMock:
    """See :class:`opkit.layers.mock.Mock`; an op's mock says what its module is.

    Args:
        plan: what to run.
        dtype: element type instead of the model's; for tests.

    Raises:
        BadInput: the model's configuration cannot be used, lacks what the op needs, or the plan
            asks for what only a serving engine has.
    """

    def __init__(self, plan: Plan, dtype: str | None = None) -> None:
        refuse_engines(plan)
        self.plan = plan
        self.config, self.origin = read_config(plan.model)
        self.stored = geometry_of(self.config, self.origin)
        self.geometry = self.stored.local(plan.tp_size)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, dtype or self.geometry.dtype)
        self.wide = torch.promote_types(self.dtype, torch.float32)  # of angles and scores
        self.weights = Weights(plan.seed, self.device, self.dtype)
        self._launcher = Launcher()
        self._case: AnyCase | None = None
        self._step: Step | None = None
        self.inputs: dict[str, Any] = {}
        self.require()
        for planned in plan.cases:
            self.check(planned.case)
        self._check_room()
        with torch.no_grad():
            self.module = self.build()
            self._caches = {
                shape.name: torch.zeros(
                    self._slots(), *shape.entry, dtype=self.dtype, device=self.device
                )
                for shape in self.caches()
            }
            self.rows = self.build_inputs()

    # What an op says of itself.

    def require(self) -> None:
        """Raise BadInput when the model has no such op."""
        raise NotImplementedError

    def build(self) -> Any:
        """The op's module, its weights drawn."""
        raise NotImplementedError

    def caches(self) -> tuple[CacheShape, ...]:
        """The op's caches."""
        return ()

    def model(self) -> dict[str, Any]:
        """Sizes for the manifest; see the op's ``columns`` and ``work``."""
        raise NotImplementedError

    def elements(self) -> int:
        """Elements of the module's weights."""
        raise NotImplementedError

    def output_shape(self, tokens: int) -> tuple[int, ...]:
        """Dimensions of the output for that many tokens."""
        return tokens, self.geometry.hidden_size

    def check(self, case: AnyCase) -> None:
        """Raise BadInput when ``case`` is none of this op's."""
        if not isinstance(case, Case):
            raise BadInput(f"{self.plan.op} has no case like {case.label()}")

    def build_inputs(self) -> Inputs:
        """Where activations come from."""
        return self._drawn(self.geometry.hidden_size)

    def arguments(self, rows: Any) -> dict[str, Any]:
        """The module's inputs by argument name, out of the tokens' rows."""
        return {"hidden_states": rows}

    def launch(self) -> Any:
        """One forward of the module on the prepared case; its output."""
        return self.module(**self.inputs, step=self._step)

    def write(self, inputs: Mapping[str, Any], step: Step) -> None:
        """Put tokens that come before a step into the caches, as the module itself does it."""
        self.module.write(inputs["hidden_states"], step)

    def graph_obstacle(self) -> str:
        """Why the forward cannot be captured into a CUDA graph; empty when it can."""
        return ""

    def extra_operands(self) -> Mapping[str, Mapping[str, int]]:
        """Submodules whose arguments are sampled, see :func:`opkit.layers.operands.watch`."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """In what this mock knowingly differs from the model."""
        return ()

    # The contract.

    def prepare(self, planned: PlannedCase[Any]) -> Forward:
        """See :meth:`opkit.layers.mock.Mock.prepare`.

        Raises:
            BadInput: the case is none of this op's.
            CaptureFailed: a graph was asked for and cannot be had, as on a CPU.
        """
        self._launcher.free()
        self.check(planned.case)
        if planned.mode is LaunchMode.GRAPH:
            obstacle = "a CPU has no CUDA graphs" if self.device.type == "cpu" else ""
            obstacle = obstacle or self.graph_obstacle()
            if obstacle:
                raise CaptureFailed(obstacle)
        with torch.no_grad():
            self.load(planned.case)
        self._case = planned.case
        return self._launcher.launch(self._forward, planned.mode)

    def load(self, case: AnyCase) -> None:
        """Make inputs and caches of ``case`` ready."""
        assert isinstance(case, Case)
        self._step = self._fill(case)
        pooled = self.plan.caches == "pooled" and self._caches
        rows = self.rows.rows(range(case.batch), 0 if pooled else case.past, case.tokens)
        self.inputs = self.arguments(rows)

    def probe(self) -> Probe:
        """See :meth:`opkit.layers.mock.Mock.probe`.

        Raises:
            RuntimeError: no case was prepared.
        """
        if self._case is None:
            raise RuntimeError("probe() needs a prepared case")
        case = self._case
        tokens = case.batch * case.tokens if isinstance(case, Case) else self._tokens(case)
        return Probe(
            dict(self.inputs), self.output_shape(tokens), dtype_name(self.dtype), self._views()
        )

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`: of every product, large or small.

        Runs eagerly, whatever the case's mode: a replayed graph calls no module.
        """
        forward = self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        phase = planned.case.phase if isinstance(planned.case, Case) else "experts"
        products = {
            name: {"input": 0}
            for name, part in self.module.named_modules()
            if isinstance(part, torch.nn.Linear)
        }
        found = watch(self.module, forward, phase, {**products, **self.extra_operands()})
        once = {operand.name: operand for operand in found}  # parts of a step call a module again
        for name, weight in self.module.named_parameters():
            called = name if name.endswith(".weight") else f"{name}.weight"
            if weight.ndim > 1 and called not in once:
                once[called] = sample(called, weight.flatten(0, -2))
        return tuple(once.values())

    def describe(self) -> Manifest:
        """See :meth:`opkit.layers.mock.Mock.describe`."""
        name = dtype_name(self.dtype)
        caches = {shape.name: name for shape in self.caches()} or {"kv_cache": "none"}
        return mock_manifest(
            self.plan,
            versions=versions(self.device),
            model={"architecture": self.geometry.architecture, **self.model()},
            dtypes={"weights": name, "activations": name, **caches},
            sources=self._sources(),
            recipe=self._recipe(),
            notes=self._notes(),
        )

    def close(self) -> None:
        """See :meth:`opkit.layers.mock.Mock.close`."""
        self._launcher.free()
        self.module = self._step = self._case = None
        self.inputs, self._caches = {}, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # How it is done.

    def _forward(self) -> Any:
        # Not inference mode: its tensors could not be changed by who checks the mock.
        with torch.no_grad():
            return self.launch()

    def _drawn(self, width: int, name: str = "hidden_states") -> Inputs:
        vocab = self.geometry.vocab_size
        return Inputs(self.plan.inputs, self.plan.seed, vocab, width, self.device, self.dtype, name)

    def _fill(self, case: Case) -> Step:
        """The case's step, what comes before it in the caches."""
        length = case.past + case.tokens
        views = {
            name: cache[: case.batch * length].unflatten(0, (case.batch, length))
            for name, cache in self._caches.items()
        }
        pooled = self.plan.caches == "pooled"
        room = _PREFILL_ROWS[self.device.type]
        together, count = max(1, room // max(1, case.past)), min(room, max(1, case.past))
        batch = 1 if pooled else case.batch
        for first in range(0, batch if views else 0, together):
            requests = range(first, min(first + together, batch))
            own = {name: view[first : requests.stop] for name, view in views.items()}
            for start in range(0, case.past, count):
                tokens = min(count, case.past - start)
                step = make_step(len(requests), tokens, start, own, self.device)
                self.write(self.arguments(self.rows.rows(requests, start, tokens)), step)
        if pooled:
            for view in views.values():
                view[1:, : case.past] = view[:1, : case.past]
        return make_step(case.batch, case.tokens, case.past, views, self.device)

    def _views(self) -> tuple[CacheView, ...]:
        """Which slots of the caches hold new tokens, and which cached ones that are read."""
        case = self._case
        if not isinstance(case, Case):
            return ()
        length = case.past + case.tokens
        found = []
        for shape in self.caches():
            oldest = max(0, case.past + 1 - shape.window) if shape.window else 0
            starts = range(0, case.batch * length, length)
            new = tuple(start + place for start in starts for place in range(case.past, length))
            past = tuple(start + place for start in starts for place in range(oldest, case.past))
            found.append(CacheView(shape.name, self._caches[shape.name], new, past))
        return tuple(found)

    def _slots(self) -> int:
        """Cache slots of the largest case."""
        cases = [planned.case for planned in self.plan.cases]
        return max(
            (case.batch * (case.past + case.tokens) for case in cases if isinstance(case, Case)),
            default=0,
        )

    def _tokens(self, case: AnyCase) -> int:
        """Tokens of a step that ``case`` stands for."""
        if isinstance(case, Case):
            return case.batch * case.tokens
        if isinstance(case, MoeCase):
            return case.tokens
        return case.m

    def _check_room(self) -> None:
        """Raise BadInput when weights and caches fill the memory: a CPU's would be swapped."""
        entries = sum(_product(shape.entry) for shape in self.caches())
        need = (self.elements() + entries * self._slots()) * self.dtype.itemsize
        if self.device.type == "cuda":
            room = torch.cuda.mem_get_info()[0]
        else:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > _ROOM[self.device.type] * room:
            raise BadInput(
                f"{self.plan.op} of {self.origin} needs {need / 2**30:,.1f} GiB for weights and "
                f"caches, this {self.device.type} has {room / 2**30:,.1f} GiB",
                "give smaller cases, more tensor-parallel ranks (tp_size), or another device",
            )

    def _sources(self) -> dict[str, str]:
        """Digests of opkit's files that the layer is made of."""
        classes = {type(part) for part in self.module.modules()} | set(type(self).__mro__)
        classes |= {Weights, Inputs, Step}
        rope = getattr(self.module, "rope", None)
        return source_digests(classes | ({type(rope)} if rope is not None else set()), ("opkit",))

    def _recipe(self) -> dict[str, str]:
        """How weights, activations and caches came to their values."""
        recipe = {"weights": self.weights.described(), "activations": self.rows.described()}
        if self.caches():
            recipe["kv_cache"] = {
                "prefilled": "the requests' earlier tokens written by this module",
                "pooled": "one request's earlier tokens written by this module, copied to all",
            }[self.plan.caches]
            recipe["kv_cache_slots"] = "a slot a token, request after request"
        return recipe

    def _notes(self) -> tuple[str, ...]:
        notes = list(self.notes())
        if self.plan.tp_size > 1:
            notes.append(
                f"tensor parallelism of {self.plan.tp_size} simulated: one rank's share, no "
                "collectives"
            )
        if self.config.get("quantization_config"):
            notes.append(
                "the model's quantization_config is left out: all products are "
                f"{dtype_name(self.dtype)}"
            )
        return tuple(notes)


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found
