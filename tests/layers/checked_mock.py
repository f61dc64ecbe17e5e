"""A small attention mock on the CPU that is right, and wrong in one way at a time.

One head over a paged cache of 16 tokens a block; float32, so that a right mock agrees with itself
to rounding. ``fault`` names what is wrong; every rule of the checklist has at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opkit.errors import BadInput
from opkit.layers.check.cases import Sizes, cases_of
from opkit.layers.check.facts import Seen
from opkit.layers.check.judge import judge
from opkit.layers.check.observe import inspect
from opkit.layers.check.result import Line
from opkit.layers.gqa import GQA
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Manifest, Operand
from opkit.layers.mock import CacheView, Probe
from opkit.layers.op import Case, LaunchMode, Op, Phase
from opkit.layers.operands import sample
from opkit.layers.plan import PlannedCase

WIDTH, BLOCK, REQUESTS, LENGTH = 64, 16, 4, 48
SIZES = Sizes(LENGTH, 3, REQUESTS)


class TinyMock:
    """See :class:`opkit.layers.mock.Mock`."""

    def __init__(self, fault: str = "", seed: int = 0, *, faint: bool = False) -> None:
        """``faint``: an engine's dummy weights make its keys, kept in a cache of their own."""
        import torch

        self.torch, self.fault, self.faint = torch, fault, faint
        stream = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(REQUESTS, LENGTH, WIDTH, generator=stream)
        if fault == "equal rows":
            self.rows = self.rows[:1, :1].expand(REQUESTS, LENGTH, WIDTH).clone()
        self.weights = torch.randn(3, WIDTH, WIDTH, generator=stream) / WIDTH**0.5
        if faint:
            self.weights[:2] *= 1e-4
        if fault == "zero weights":
            self.weights[0] = 0
        self.blocks = LENGTH // BLOCK
        self.cache = torch.zeros(1 + REQUESTS * self.blocks, BLOCK, 2, WIDTH)
        self.calls = 0
        self.case = Case(Phase.CONTEXT, 1, 1, 0)
        self.hidden: Any = None

    def prepare(self, planned: PlannedCase[Case]) -> Callable[[], Any]:
        case, graph = planned.case, planned.mode is LaunchMode.GRAPH
        if self.fault == "no prefix" and case.phase is Phase.CONTEXT and case.past:
            raise BadInput("this engine caches no prefixes")
        if self.fault == "refuses" and case.phase is Phase.GENERATION:
            raise BadInput("the server's max_num_seqs is 0", hint="raise --max-num-seqs")
        if self.fault == "no graph" and graph:
            raise CaptureFailed("the forward cannot be captured: operation not permitted")
        self.case, self.cache[:] = case, 0
        for request in range(case.batch):
            for place in range(case.past):
                self.write(request, place, self.rows[request, place])
        new = self.rows[: case.batch, case.past : case.past + case.tokens]
        if self.fault == "other prompt" and case.phase is Phase.GENERATION:
            new = new + 1
        if self.fault == "rounded input" and case.phase is Phase.GENERATION:
            new = new * (1 + 1e-6)
        self.hidden = new.reshape(-1, WIDTH).clone()
        if self.fault == "nan input":
            self.hidden[0, 0] = float("nan")
        if self.fault == "input type":
            self.hidden = self.hidden.double()
        if self.fault == "scattered input":
            self.hidden = self.hidden.t().contiguous().t()
        if self.fault == "few rows":
            self.hidden = self.hidden[: max(1, len(self.hidden) // 2)]
        return lambda: self.forward(graph)

    def slot(self, request: int, place: int) -> tuple[int, int]:
        return 1 + request * self.blocks + place // BLOCK, place % BLOCK

    def write(self, request: int, place: int, row: Any) -> None:
        block, offset = self.slot(request, place)
        self.cache[block, offset, 0] = row @ self.weights[1]
        self.cache[block, offset, 1] = row @ self.weights[2]

    def cached(self, request: int, count: int) -> Any:
        first = 1 + request * self.blocks
        return self.cache[first : first + self.blocks].reshape(-1, 2, WIDTH)[:count]

    def forward(self, graph: bool) -> Any:
        case, torch = self.case, self.torch
        self.calls += 1
        if self.fault == "fails at length 1" and case.batch * (case.tokens + case.past) == 1:
            raise RuntimeError("a grid of no blocks")
        if self.fault == "fails at batch" and case.batch > 1:
            raise RuntimeError("out of workspace")
        if self.fault == "raises" and case.past:
            raise ValueError("no metadata")
        hidden = self.hidden.to(torch.float32)
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, case.batch * case.tokens - len(hidden)))
        if self.fault == "in place":
            self.hidden.mul_(0.5)
        new = hidden.reshape(case.batch, case.tokens, WIDTH)
        outputs = []
        for request in range(case.batch):
            for place in range(case.tokens):
                if self.fault != "not written":
                    self.write(request, case.past + place, new[request, place])
            for place in range(case.tokens):
                outputs.append(self.attend(request, place, new[request, place]))
        output = torch.stack(outputs)
        return self.spoilt(output, graph)

    def attend(self, request: int, place: int, row: Any) -> Any:
        case = self.case
        seen = self.cached(request, case.past + place + 1)
        if self.fault == "not read" and case.past:
            seen = seen[case.past :]
        if self.fault == "keys not read" and case.past:
            seen = seen.clone()
            seen[:, 0] = row @ self.weights[1]
        if self.fault == "off by one" and case.phase is Phase.GENERATION:
            seen = seen[:-1]
        if self.fault == "not written":  # and so it attends to what it has in hand
            seen = self.torch.stack((row @ self.weights[1], row @ self.weights[2]))[None]
        scores = (row @ self.weights[0]) @ seen[:, 0].t() / WIDTH**0.5
        return self.torch.softmax(scores, dim=-1) @ seen[:, 1]

    def spoilt(self, output: Any, graph: bool) -> Any:
        case = self.case
        many = case.batch > 1
        match self.fault:
            case "no output":
                return None
            case "wide":
                return output[:, : WIDTH // 2]
            case "other type":
                return output.double()
            case "nan":
                output[-1, 3] = float("nan")
            case "all zeros":
                output.zero_()
            case "zero row" if many:
                output[-1] = 0
            case "zero row at length 1" if len(output) == 1:
                output.zero_()
            case "mixes requests" if many:
                output = output.roll(case.tokens, 0)
            case "stale graph" if graph:
                output = output + 0.3 * output.roll(1, 1)
            case "drifts":
                output = output * (1 + self.calls)
        return output

    def probe(self) -> Probe:
        case = self.case
        length = case.past + case.tokens
        new, past = [], []
        for request in range(case.batch):
            blocks = [self.slot(request, place)[0] for place in range(length)]
            new += sorted(set(blocks[case.past :]))
            past += sorted(set(blocks[: case.past]) - set(blocks[case.past :]))
        if self.fault == "cache outside":
            new.append(10_000)
        view = CacheView("kv_cache", self.cache, tuple(new), tuple(past))
        caches = () if self.fault == "no cache" else (view,)
        if self.faint:
            caches = tuple(
                CacheView(name, self.cache[:, :, half], tuple(new), tuple(past))
                for half, name in enumerate(("k_cache", "v_cache"))
            )
        shape = (case.batch * case.tokens, WIDTH)
        return Probe({"hidden_states": self.hidden}, shape, "float32", caches)

    def operands(self, planned: PlannedCase[Case]) -> tuple[Operand, ...]:
        if self.fault == "no operands":
            return ()
        if self.fault == "operands raise":
            raise KeyError("o_proj")
        self.prepare(planned)
        return sample("q_proj.weight", self.weights[0]), sample("q_proj.input", self.hidden)

    def describe(self) -> Manifest:
        return Manifest("mock", "gqa", "torch", dtypes={"activations": "float32"})

    def close(self) -> None:
        """Nothing is held."""


def looked_at(mock: Any, *, inputs: str = "tokens", op: Op = GQA) -> dict[str, Line]:
    """The checklist over ``mock`` as if a GPU were here: graphs are asked for, too."""
    asked = cases_of(op, SIZES, graphs=True, caches=True)
    seen = Seen(op.name, "torch", "cuda", inputs, True, ("float32",), ("float32",), asked)
    inspect(mock, seen, lambda _: None, lambda _: None)
    return {line.check: line for line in judge(seen)}
