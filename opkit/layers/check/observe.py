"""Look at a mock, case by case, through the Mock protocol alone.

Each case is prepared once and run a few times: twice as it is, once for each cache with the new
tokens' blocks blanked, once for each cache with the past blanked (and once more with it stirred,
where blanking shows nothing). What a run changes beyond the mock's own doing is put back before the
next.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opkit.errors import BadInput, OpkitError
from opkit.layers.check.cases import Asked, Role
from opkit.layers.check.facts import (
    LEAST_CHANGE,
    CacheFact,
    Difference,
    Observation,
    Pair,
    Seen,
)
from opkit.layers.check.pairs import alike
from opkit.layers.check.tensors import (
    Blocks,
    difference,
    fact,
    is_tensor,
    same_bits,
)
from opkit.layers.graphs import CaptureFailed
from opkit.layers.manifest import Operand
from opkit.layers.mock import CacheView, Forward, Mock, Probe
from opkit.layers.op import Case
from opkit.layers.operands import dtype_name

# The same tokens in two cases: the last of the first case are the first of the second.
PAIRS = (
    (Role.CONTEXT, Role.GENERATION),
    (Role.CONTEXT, Role.PREFIX),
    (Role.CONTEXT, Role.MANY_CONTEXT),
    (Role.GENERATION, Role.MANY_GENERATION),
    (Role.GENERATION, Role.GRAPH),
    (Role.MANY_GENERATION, Role.MANY_GRAPH),
)

Told = Callable[[str], None]


@dataclass
class _Rows:
    """What is kept of a case: of inputs and output a row a token, request after request."""

    inputs: dict[str, Any]
    output: Any


class Observer:
    """Looks at one mock.

    Args:
        mock: built, with every case that will be asked.
        told: takes a line for whoever watches.
    """

    def __init__(self, mock: Mock, told: Told) -> None:
        self._mock = mock
        self._told = told
        self._torch = importlib.import_module("torch")
        self._kept: dict[Role, _Rows] = {}

    def observe(self, asked: Asked) -> Observation:
        """Prepare one case, run it, and say what was seen. A failure is part of what was seen."""
        self._told(f"{asked.role}: {asked.label()}")
        try:
            return self._look(asked, self._mock.prepare(asked.planned))
        except CaptureFailed as error:
            return Observation(asked, uncaptured=str(error), fix=error.hint or "")
        except BadInput as error:
            return Observation(asked, refused=str(error), fix=error.hint or "")
        except OpkitError as error:
            return Observation(asked, broke=str(error), fix=error.hint or "")
        except Exception as error:
            return Observation(asked, broke=sentence(error))

    def operands(self, asked: Asked) -> tuple[Operand, ...]:
        """What the mock's large kernels are given in one case."""
        self._told(f"operands: {asked.label()}")
        return self._mock.operands(asked.planned)

    def pairs(self) -> list[Pair]:
        """Every two cases that share tokens, compared."""
        return [
            self._pair(first, second)
            for first, second in PAIRS
            if first in self._kept and second in self._kept
        ]

    def _run(self, forward: Forward) -> Any:
        """One forward, awaited; a copy of its output, or None."""
        output = forward()
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()
        return output.detach().clone() if is_tensor(output) else None

    def _look(self, asked: Asked, forward: Forward) -> Observation:
        # Engines make their tensors in inference mode: outside it these could not be put back.
        with self._torch.inference_mode():
            return self._look_inside(asked, forward)

    def _look_inside(self, asked: Asked, forward: Forward) -> Observation:
        probe = self._mock.probe()
        inputs = {name: value for name, value in probe.inputs.items() if is_tensor(value)}
        facts = [fact(name, value) for name, value in inputs.items()]
        before = {name: value.clone() for name, value in inputs.items()}
        output, again = self._run(forward), self._run(forward)
        facts = [
            replace(seen, changed=not same_bits(inputs[seen.name], before[seen.name]))
            for seen in facts
        ]

        def restored() -> Any:
            for name, value in inputs.items():
                value.copy_(before[name])
            return self._run(forward)

        caches = tuple(self._cache(cache, restored, output) for cache in probe.caches)
        self._keep(asked, probe, before, output)
        return Observation(
            asked,
            inputs=tuple(facts),
            output=None if output is None else fact("output", output),
            shape=tuple(probe.shape),
            dtype=probe.dtype,
            repeated=None if output is None or again is None else difference(output, again),
            caches=caches,
        )

    def _cache(self, cache: CacheView, run: Callable[[], Any], output: Any) -> CacheFact:
        """Is it written, is it read: change it, run, look, put back."""
        size = cache.tensor.shape[0] if cache.tensor.dim() else 0
        new = [number for number in cache.new if 0 <= number < size]
        past = [number for number in cache.past if 0 <= number < size and number not in new]
        outside = sum(not 0 <= number < size for number in (*cache.new, *cache.past))
        written, read = 0, None
        if new:
            blocks = Blocks(cache.tensor, new)
            blocks.blank()
            run()
            written = blocks.filled()
            blocks.restore()
        if past:
            read = _effect(Blocks(cache.tensor, past), run, output)
        shape = tuple(cache.tensor.shape)
        dtype = dtype_name(cache.tensor.dtype)
        return CacheFact(cache.name, shape, dtype, len(new), outside, written, len(past), read)

    def _keep(self, asked: Asked, probe: Probe, inputs: dict[str, Any], output: Any) -> None:
        """Keep rows for :meth:`pairs`, on the CPU, where a case has a row a token."""
        case = asked.planned.case
        if not isinstance(case, Case) or output is None or tuple(output.shape) != probe.shape:
            return
        rows = case.batch * case.tokens
        if output.numel() % rows:
            return
        # The first request of a large batch is enough, but replays are compared whole.
        whole = asked.role in (Role.MANY_GENERATION, Role.MANY_GRAPH)
        count = rows if whole else case.tokens

        def part(tensor: Any) -> Any:
            return tensor.reshape(rows, -1)[:count].cpu()

        of_rows = {
            name: part(value)
            for name, value in inputs.items()
            if value.dim() and value.numel() % rows == 0 and _leads(value.shape, case)
        }
        self._kept[asked.role] = _Rows(of_rows, part(output))

    def _pair(self, first: Role, second: Role) -> Pair:
        one, other = self._kept[first], self._kept[second]
        count = min(len(one.output), len(other.output))
        names = [
            name
            for name in one.inputs
            if name in other.inputs
            and _differ(one.inputs[name][-count:], other.inputs[name][:count])
        ]
        outputs = difference(one.output[-count:], other.output[:count])
        return Pair(first, second, tuple(names), outputs)


def _effect(blocks: Blocks, run: Callable[[], Any], output: Any) -> Difference | None:
    """The output with ``blocks`` blanked; stirred, where blanking shows nothing."""
    if output is None:
        return None
    blocks.blank()
    found = difference(output, run())
    if found is not None and found.relative <= LEAST_CHANGE and blocks.stir():
        found = difference(output, run())
    blocks.restore()
    return found


def _differ(first: Any, second: Any) -> bool:
    """Whether two inputs of the same tokens differ by more than rounding."""
    if same_bits(first, second):
        return False
    if not (first.is_floating_point() and second.is_floating_point()):
        return True
    return not alike(difference(first, second), dtype_name(first.dtype))


def inspect(mock: Mock, seen: Seen, told: Told, before: Callable[[str], object]) -> None:
    """Look at everything that ``seen`` asks for, and put what is found into it.

    Args:
        mock: built, with all of these cases.
        seen: cases that have an observation already are left as they are.
        told: takes a line for whoever watches.
        before: called with the name of each case before it is run.
    """
    observer = Observer(mock, told)
    known = [observation.asked for observation in seen.observations]
    for asked in seen.asked:
        if asked not in known:
            before(asked.label())
            seen.observations.append(observer.observe(asked))
    seen.pairs = observer.pairs()
    before("the sampling of operands")
    found: dict[str, Operand] = {}
    try:
        for o in seen.of(Role.CONTEXT, Role.GENERATION):
            if o.ran:
                found.update({item.name: item for item in observer.operands(o.asked)})
    except Exception as error:
        seen.operands_broke = sentence(error)
    seen.operands = tuple(found.values())


def sentence(error: Exception) -> str:
    """An exception as one line; its traceback goes to stderr, where the parent keeps it."""
    traceback.print_exception(error, file=sys.stderr)
    reason = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def _leads(shape: Any, case: Case) -> bool:
    """Whether a tensor has a row for each token of the case."""
    flat = shape[0] == case.batch * case.tokens
    return flat or tuple(shape[:2]) == (case.batch, case.tokens)
