"""The sweep: which cases of an op are to be collected.

Each op brings its grid (``layers/<op>/sweep.toml``); a user's file of the same form, TOML or YAML,
replaces it. Grids are data, so that another model's needs are a file and not a release.
"""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from opkit.errors import BadInput, WrongUsage
from opkit.layers.op import AnyCase, Case, GemmCase, MoeCase, Op, Phase
from opkit.layers.plan import parse_routing

SMOKE_CASES = 3  # of each phase
SMOKE_TOKENS = 8192  # new and cached tokens of a smoke case, at most


@dataclass(frozen=True)
class Sweep:
    """Cases to collect.

    Attributes:
        origin: the file they come from, as shown to the user.
        tp: tensor-parallel sizes to simulate; each case is measured for each.
        cases: in the order of the grid.
        seconds: what a case takes on average, by phase (``""`` for rows that know none), for the
            estimate.
    """

    origin: str
    tp: tuple[int, ...]
    cases: tuple[AnyCase, ...]
    seconds: dict[str, float]

    def count(self) -> int:
        """Rows that it makes."""
        return len(self.tp) * len(self.cases)

    def estimate_s(self) -> float:
        """Seconds on one GPU, start-up left out."""
        return len(self.tp) * sum(self.seconds.get(phase_of(case), 0.0) for case in self.cases)


def phase_of(case: AnyCase) -> str:
    """The phase of a case; empty when the rows of its op know none."""
    return str(case.phase) if isinstance(case, Case) else ""


def phases_of(op: Op) -> tuple[str, ...]:
    """The phases that an op is collected in: ``""`` alone when its rows know none.

    Not those in which it is aligned: a matrix product, or a mixture of experts, has one table for
    both.
    """
    return tuple(str(phase) for phase in op.tables or op.phases) or ("",)


def read_sweep(op: Op, file: Path | None = None) -> Sweep:
    """The op's own grid, or that of ``file``.

    Raises:
        BadInput: the file cannot be read, has unknown or missing fields, or makes no case.
    """
    if file is None:
        text = resources.files("opkit.layers").joinpath(op.name, "sweep.toml").read_text("utf-8")
        return _sweep(op, tomllib.loads(text), f"the grid of {op.name}")
    try:
        data = _parse(file.read_text("utf-8"), file.suffix)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"{file}: not a readable sweep ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"{file}: a sweep is a table of grids, not a {type(data).__name__}")
    return _sweep(op, data, str(file))


def _parse(text: str, suffix: str) -> Any:
    """TOML, or YAML by its suffix; ValueError when it is neither."""
    if suffix.lower() in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    return tomllib.loads(text)


def _sweep(op: Op, data: dict[str, Any], origin: str) -> Sweep:
    grids = {"context": _context, "generation": _generation, "gemm": _gemm, "moe": _moe}
    wanted = {phase or op.name: phase for phase in phases_of(op)}
    unknown = sorted(set(data) - {"tp", *wanted})
    if unknown:
        raise BadInput(f"{origin}: {op.name} has no {', '.join(unknown)}; known: tp, "
                       f"{', '.join(wanted)}")  # fmt: skip
    cases: list[AnyCase] = []
    seconds = {}
    for name, phase in wanted.items():
        if name in data:
            grid = _Grid(data[name], f"{origin}, [{name}]")
            seconds[phase] = grid.number("seconds", 0.2)
            cases += grids[name](grid)
            grid.done()
    if not cases:
        raise BadInput(f"{origin}: no case of {op.name}")
    return Sweep(origin, _Grid(data, origin).whole("tp", [1]), tuple(cases), seconds)


class _Grid:
    """One table of a sweep file: values checked as they are taken, leftovers refused."""

    def __init__(self, data: Any, origin: str) -> None:
        if not isinstance(data, dict):
            raise BadInput(f"{origin}: not a table")
        self._data, self.origin = dict(data), origin

    def whole(self, name: str, default: list[int] | None = None, least: int = 1) -> tuple[int, ...]:
        """A list of whole numbers from ``least`` on."""
        values = self._data.pop(name, default)
        if values is None:
            raise BadInput(f"{self.origin}: {name} is missing")
        if not isinstance(values, list) or not values or not all(
            isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values
        ):  # fmt: skip
            raise BadInput(f"{self.origin}: {name} must be a list of whole numbers from {least} on")
        return tuple(dict.fromkeys(values))

    def words(self, name: str, default: list[str]) -> tuple[str, ...]:
        """A list of words."""
        values = self._data.pop(name, default)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise BadInput(f"{self.origin}: {name} must be a list of words")
        return tuple(dict.fromkeys(values))

    def number(self, name: str, default: float) -> float:
        """A number above zero."""
        value = self._data.pop(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise BadInput(f"{self.origin}: {name} must be a number above zero")
        return float(value)

    def pairs(self, name: str) -> set[tuple[int, int]]:
        """A list of pairs of whole numbers."""
        values = self._data.pop(name, [])
        try:
            return {(int(a), int(b)) for a, b in values}
        except (TypeError, ValueError) as error:
            raise BadInput(f"{self.origin}: {name} must be a list of pairs") from error

    def done(self) -> None:
        """Refuse what nobody asked for: a misspelt limit would be no limit."""
        if self._data:
            raise BadInput(f"{self.origin}: unknown {', '.join(sorted(self._data))}")


def _context(grid: _Grid) -> list[AnyCase]:
    most = grid.number("max_tokens", float("inf"))
    batches, tokens, pasts = grid.whole("batch"), grid.whole("tokens"), grid.whole("past", [0], 0)
    return [
        Case(Phase.CONTEXT, batch, count, past)
        for past, count, batch in itertools.product(pasts, tokens, batches)
        if batch * count <= most
    ]


def _generation(grid: _Grid) -> list[AnyCase]:
    most = grid.number("max_cached_tokens", float("inf"))
    batches, pasts = grid.whole("batch"), grid.whole("past")
    return [
        Case(Phase.GENERATION, batch, 1, past)
        for past, batch in itertools.product(pasts, batches)
        if batch * past <= most
    ]


def _gemm(grid: _Grid) -> list[AnyCase]:
    skip = grid.pairs("skip")
    dtypes = grid.words("dtype", ["bfloat16"])
    sizes = itertools.product(grid.whole("n"), grid.whole("k"), grid.whole("m"))
    return [
        GemmCase(m, n, k, dtype)
        for dtype, (n, k, m) in itertools.product(dtypes, sizes)
        if (n, k) not in skip
    ]


def _moe(grid: _Grid) -> list[AnyCase]:
    routings = grid.words("routing", ["balanced"])
    for routing in routings:
        parse_routing(routing, grid.origin)
    return [
        MoeCase(count, routing)
        for routing, count in itertools.product(routings, grid.whole("tokens"))
    ]


def select(
    sweep: Sweep,
    *,
    phases: Sequence[str] = (),
    tp: Sequence[int] = (),
    filters: Sequence[str] = (),
    smoke: bool = False,
    shuffle: int | None = None,
    limit: int | None = None,
) -> Sweep:
    """What the user wants of a sweep.

    Args:
        sweep: all of it.
        phases, tp: only these, when given.
        filters: conditions as ``batch<=16`` that a case must meet, all of them.
        smoke: three small cases of each phase.
        shuffle: seed of a random order; None keeps the grid's.
        limit: cases in all, at most.

    Raises:
        WrongUsage: a filter that cannot be understood.
        BadInput: nothing is left.
    """
    tests = [_condition(text) for part in filters for text in part.split(",")]
    cases = [
        case
        for case in sweep.cases
        if (not phases or phase_of(case) in phases) and all(test(case) for test in tests)
    ]
    if smoke:
        cases = _smoke(cases)
    if shuffle is not None:
        random.Random(shuffle).shuffle(cases)
    cases = cases[:limit]
    ranks = tuple(dict.fromkeys(tp)) or sweep.tp
    if smoke:
        ranks = ranks[:1]
    if not cases:
        raise BadInput("no case is left to collect", "see what there is with --plan, no filter")
    return Sweep(sweep.origin, ranks, tuple(cases), sweep.seconds)


def _smoke(cases: list[AnyCase]) -> list[AnyCase]:
    """Three small cases of each phase, evenly spread."""
    found: list[AnyCase] = []
    for phase in dict.fromkeys(phase_of(case) for case in cases):
        small = [c for c in cases if phase_of(c) == phase and size_of(c) <= SMOKE_TOKENS]
        small.sort(key=size_of)
        step = max(1, (len(small) - 1) // (SMOKE_CASES - 1))
        found += small[::step][:SMOKE_CASES]
    return found


def size_of(case: AnyCase) -> int:
    """How large a case is: new and cached tokens, or rows of a matrix product."""
    if isinstance(case, GemmCase):
        return case.m
    return case.tokens if isinstance(case, MoeCase) else case.batch * (case.tokens + case.past)


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<=": lambda a, b: bool(a <= b),
    ">=": lambda a, b: bool(a >= b),
    "!=": lambda a, b: bool(a != b),
    "=": lambda a, b: bool(a == b),
    "<": lambda a, b: bool(a < b),
    ">": lambda a, b: bool(a > b),
}
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*([\w.]+)\s*")


def _condition(text: str) -> Callable[[AnyCase], bool]:
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise WrongUsage(f"{text!r}: not a condition", "as in --case-filter 'batch<=16,past=0'")
    name, sign, word = found.groups()
    value: int | str = int(word) if word.isdigit() else word

    def test(case: AnyCase) -> bool:
        known = vars(case)
        if name not in known:
            raise WrongUsage(f"{text!r}: a case has no {name}; it has {', '.join(known)}")
        if isinstance(known[name], str) != isinstance(value, str):
            raise WrongUsage(f"{text!r}: {name} is not compared with {word!r}")
        return _COMPARE[sign](known[name], value)

    return test
