"""From a sweep to groups of work: what shares one build of the mock, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opkit.collect.measurement import Timing
from opkit.collect.sweep import Sweep, phase_of, size_of
from opkit.collect.work import Group, Task, content_key, series_of
from opkit.layers.op import AnyCase, Case, LaunchMode, Op, Phase
from opkit.layers.plan import Plan, PlannedCase

# Tokens of a step up to which context cases share a build. A build reserves workspaces for its
# largest step, so that one of 131,072 tokens leaves little of an 80 GB GPU to anything else.
CONTEXT_LEVELS = (8192, 32768, 65536, 131072)


@dataclass(frozen=True)
class Subject:
    """What is measured, apart from the cases; everything that the rows of a table share.

    Attributes:
        op, backend: of the mock.
        model: folder with the model's configuration; empty for an op without a model.
        engine_args: the serving command's flags, without the model.
        modes: launch mode of each phase.
        seed: of prompts and operands.
        admitted: for each phase, see :meth:`opkit.collect.admission.Admission.subject`.
    """

    op: Op
    backend: str
    model: str
    engine_args: tuple[str, ...]
    modes: Mapping[str, LaunchMode]
    seed: int
    admitted: Mapping[str, Mapping[str, Any]]

    def plan(self, tp_size: int, cases: tuple[PlannedCase[Any], ...]) -> Plan:
        """The build that measures ``cases``."""
        return Plan(
            op=self.op.name,
            backend=self.backend,
            model=self.model,
            cases=cases,
            manifest="",  # the worker reports it
            engine_args=self.engine_args,
            tp_size=tp_size,
            seed=self.seed,
            limits="cases",
            caches="pooled",
        )

    def planned(self, case: AnyCase) -> PlannedCase[Any]:
        """The case in the launch mode of its phase."""
        return PlannedCase(case, self.modes[phase_of(case)])

    def series(self, timing: Timing, phase: str) -> str:
        """What the keys of a phase's rows begin with."""
        return series_of(self.plan(1, ()), timing, self.admitted[phase])


def make_groups(subject: Subject, sweep: Sweep, timing: Timing, ordered: bool) -> list[Group]:
    """Group the sweep's cases by build.

    Args:
        subject: what is measured.
        sweep: the cases.
        timing: how.
        ordered: whether the sweep's order is wanted (``--shuffle``); else small cases come first,
            so that memory grows once.
    """
    series = {phase: subject.series(timing, phase) for phase in subject.admitted}
    groups = []
    for tp_size in sweep.tp:
        builds: dict[str, list[AnyCase]] = {}
        for case in sweep.cases:
            builds.setdefault(_build_of(case), []).append(case)
        for name, cases in builds.items():
            if not ordered:
                cases = sorted(cases, key=size_of)
            planned = tuple(subject.planned(case) for case in cases)
            tasks = tuple(
                Task(content_key(series[phase_of(item.case)], tp_size, item), item)
                for item in planned
            )
            title = f"{subject.op.name} {subject.backend} {name} tp {tp_size}".replace("  ", " ")
            groups.append(Group(title, subject.plan(tp_size, planned), tasks, timing))
    return groups


def _build_of(case: AnyCase) -> str:
    """What a case shares its build with: its phase, and in context the size of the step.

    Products and steps of experts share one: what they need grows with their tokens alone.
    """
    if not isinstance(case, Case):
        return ""
    if case.phase is Phase.GENERATION:
        return str(case.phase)
    tokens = case.batch * case.tokens
    level = next((level for level in CONTEXT_LEVELS if tokens <= level), tokens)
    return f"{case.phase} to {level:,} tokens"
