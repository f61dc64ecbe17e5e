"""The checklist: each rule over what was seen of a mock. Plain numbers in, lines out."""

from __future__ import annotations

from collections.abc import Callable

from opkit.layers.check import caches, outputs, pairs
from opkit.layers.check.facts import Seen
from opkit.layers.check.result import Line

Rule = Callable[[Seen, str], Line]
# In the order of the report. The names are those of causes.ADVICE.
RULES: dict[str, Rule] = {
    "forward": lambda seen, name: outputs.runs(seen, name, outputs.BASE),
    "input format": outputs.inputs,
    "output shape": outputs.shapes,
    "output dtype": outputs.dtypes,
    "finite output": outputs.finite,
    "KV cache present": caches.present,
    "KV cache written": caches.written,
    "KV cache read": caches.read,
    "batch 1, length 1": lambda seen, name: outputs.runs(seen, name, outputs.SMALLEST),
    "large batch": pairs.large,
    "CUDA graph": pairs.graphs,
    "graph = eager": pairs.graph_same,
    "repeatable": pairs.repeatable,
    "input untouched": outputs.untouched,
    "context = generation": pairs.phases,
    "operands": outputs.operands,
    "collected cases": outputs.own,
}


def judge(seen: Seen) -> tuple[Line, ...]:
    """The whole checklist over what was seen, in its order."""
    return tuple(rule(seen, name) for name, rule in RULES.items())
