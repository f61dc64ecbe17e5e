"""Admission: collect asks the ledger, and the ledger must have proved exactly this.

Asked twice: before anything is started, with what is known then (op, backend, GPU, policy), and
when the mock is built, with what it says of itself (versions, dtypes, layer sources). Both times
every difference is named; ``--waive`` lets a run through, and its reason stands in every row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opkit.align.ledger import FRAMEWORKS, Ledger, LedgerEntry
from opkit.align.policy import Policy
from opkit.errors import Refused
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode, Op
from opkit.layers.plan import INPUTS
from opkit.layers.registry import find_op
from opkit.nsys_parsers.names import parse_name

# Parts of a layer's source that decide what is launched; opkit's own worker and mock among them.
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Admission:
    """What admits a collection.

    Attributes:
        op, backend: what is to be collected.
        entries: the verdict of each aligned phase that has one. For rows that know no phase they
            count all together.
        differences: why the ledger does not admit it; empty when it does.
        waiver: the user's reason to collect all the same.
    """

    op: str
    backend: str
    entries: dict[str, LedgerEntry] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    waiver: str = ""

    @property
    def verdicts(self) -> str:
        """The verdicts' ids, for a row; empty when there are none."""
        return " ".join(sorted({entry.id for entry in self.entries.values()}))

    def subject(self, phase: str, framework: str, gpu: str, model: str = "") -> dict[str, Any]:
        """What the keys of a phase's rows stand for; equal for every run of the same subject.

        Rows that a waiver let through have keys of their own: what they were made of is not what
        the verdict says, so they must never be taken for admitted ones, nor these for them.

        Args:
            phase: of the rows; empty where they know none.
            framework: version of the backend on this host.
            gpu: name of the GPU.
            model: digest of the model's configuration as given; empty when there is none.
        """
        found: dict[str, Any] = {"framework": framework, "gpu": gpu}
        entries = self._of(phase)
        if entries:
            found |= {
                "dtypes": _together(entry.dtypes for entry in entries),
                "layer": _together(entry.layer_digest for entry in entries),
                "model": _together(map(_model, entries)),
            }
        if model:
            found["model"] = model
        if self.waiver:
            found["waived"] = True
        return found

    def _of(self, phase: str) -> list[LedgerEntry]:
        """The verdicts that rows of a phase stand on; all where rows know no phase."""
        if not phase:
            return list(self.entries.values())
        return [self.entries[phase]] if phase in self.entries else []

    def engine_args(self) -> tuple[str, ...]:
        """The serving command's flags that were aligned; empty when no verdict tells them."""
        for entry in self.entries.values():
            found = _provenance(entry).get("engine_args") or ()
            if found:
                return tuple(found)
        return ()

    def mode(self, phase: str) -> LaunchMode | None:
        """The launch mode in which the engine was seen to run the phase."""
        entry = self.entries.get(phase)
        if entry is None:
            return None
        for result in entry.alignment().phases:
            for case in result.cases if str(result.phase) == phase else ():
                if case.e2e.mode is not None:
                    return case.e2e.mode
        return None

    def kernels(self, phase: str) -> frozenset[str]:
        """The kernels that the engine was seen to launch in the phase, by :func:`kernel_kind`.

        In any phase, for rows that know none.
        """
        return frozenset(
            kernel_kind(pair.e2e.name)
            for entry in self._of(phase)
            for result in entry.alignment().phases
            if str(result.phase) == (phase or entry.phase)
            for case in result.cases
            for pair in case.pairs
            if pair.e2e is not None
        )


def kernel_kind(name: str) -> str:
    """What stays of a kernel's name between variants and between demanglers.

    Element-wise kernels are told apart by their functor, others by their name without tile and
    template arguments.
    """
    known = parse_name(name)
    return known.short if known.glue or "elementwise" in known.short else known.stem


def ask_ledger(
    ledger: Ledger,
    op: Op,
    phases: Sequence[str],
    backend: str,
    *,
    gpu: str = "",
    policy: Policy | None = None,
    waiver: str = "",
    eager: bool = False,
    framework: str = "",
    model: str = "",
) -> Admission:
    """Ask before anything is started.

    Args:
        ledger: the record of verdicts.
        op: what is to be collected.
        phases: what is collected, see :func:`opkit.collect.sweep.phases_of`. Rows that know no
            phase (``""``) want a verdict on each phase in which the op is aligned.
        backend: whose classes build the mock.
        gpu: the GPU's name, when it is known already.
        policy: what the verdict must have been judged by; the default policy when None.
        waiver: reason to collect without a verdict.
        eager: kernels are to be launched one by one, whatever the engine does.
        framework, model: version of the backend and digest of the model's configuration, where they
            are known: a verdict on these comes before a newer one on others.

    Raises:
        Refused: nothing admits it and there is no waiver; every difference is named.
    """
    entries: dict[str, LedgerEntry] = {}
    differences: list[str] = []
    for phase in _aligned_phases(ledger, op, phases, backend):
        entry, why = _entry(ledger, op, phase, backend, gpu, framework, model)
        if entry is not None:
            entries[phase] = entry
            why += _judged_otherwise(entry, policy or Policy()) + _fed_otherwise(entry)
        differences += why
    found = Admission(op.name, backend, entries, tuple(dict.fromkeys(differences)), waiver)
    if eager:
        otherwise = tuple(
            f"launch mode: {entry.id} holds for {phase} in mode {mode}, asked for is eager"
            for phase, entry in entries.items()
            if (mode := found.mode(phase)) not in (None, LaunchMode.EAGER)
        )
        found = replace(found, differences=(*found.differences, *otherwise))
    return _decide(found)


def _aligned_phases(ledger: Ledger, op: Op, phases: Sequence[str], backend: str) -> Sequence[str]:
    """The phases whose verdicts are wanted."""
    if any(phases):
        return phases
    # Without any verdict that is said once, not for each phase.
    if not op.phases or not ledger.entries(op.name, backend=backend):
        return [""]
    return [str(phase) for phase in op.phases]


def _together(values: Iterable[str]) -> str:
    """What verdicts say of one thing: once where they agree."""
    return " ".join(dict.fromkeys(values))


def check_mock(admission: Admission, mock: Manifest, gpu: str) -> Admission:
    """Ask again when the mock is built.

    Raises:
        Refused: the mock is not what the verdicts hold for, and there is no waiver.
    """
    found = [
        difference
        for entry in admission.entries.values()
        for difference in _differences(entry, mock, gpu)
    ]
    known = tuple(dict.fromkeys((*admission.differences, *found)))
    return _decide(
        Admission(admission.op, admission.backend, admission.entries, known, admission.waiver)
    )


def _decide(found: Admission) -> Admission:
    if found.differences and not found.waiver:
        listed = "; ".join(found.differences)
        raise Refused(
            f"{found.op} on {found.backend} is not admitted: {listed}",
            f"align it first: opkit align {found.op} --e2e-cmd '…'\n"
            "or say why it may be collected all the same: --waive 'reason'",
        )
    return found


def _entry(
    ledger: Ledger, op: Op, phase: str, backend: str, gpu: str, framework: str, model: str
) -> tuple[LedgerEntry | None, list[str]]:
    """The newest verdict on this GPU, version and model, or what stands in the way."""
    what = f"{op.name} {phase}".strip()
    entries = ledger.entries(op.name, phase=phase or None, backend=backend)
    if not entries:
        others = sorted({e.backend for e in ledger.entries(op.name, phase=phase or None)})
        told = f" (there is one on {', '.join(others)})" if others else ""
        return None, [f"no verdict on {what} for {backend}{told}"]
    here = [entry for entry in entries if not gpu or entry.gpu == gpu]
    if not here:
        return entries[0], [f"GPU: {what} was aligned on {entries[0].gpu}, this is {gpu}"]
    here = [entry for entry in here if not _fed_otherwise(entry)] or here
    exact = [
        entry
        for entry in here
        if (not framework or entry.framework == framework) and (not model or _model(entry) == model)
    ]
    entry = (exact or here)[0]
    if entry.passed:
        return entry, []
    failed = [
        check.check
        for result in entry.alignment().phases
        if str(result.phase) == phase
        for check in result.checks
        if str(check.outcome) != "pass"
    ]
    return entry, [f"the newest verdict on {what}, {entry.id}, is {entry.verdict} "
                   f"({', '.join(failed) or 'no check told'})"]  # fmt: skip


def _judged_otherwise(entry: LedgerEntry, policy: Policy) -> list[str]:
    """Where the verdict's policy differs from the one asked for."""
    theirs = json.loads(entry.policy)
    ours = json.loads(json.dumps(vars(policy), default=vars))
    return [
        f"policy: {entry.id} was judged with {name} = {theirs.get(name)}, asked for is {value}"
        for name, value in sorted(ours.items())
        if theirs.get(name) != value
    ]


def _fed_otherwise(entry: LedgerEntry) -> list[str]:
    """Where the aligned mock's activations were not made as those of every collection are.

    Rows of a routed op state how their tokens were sent; what was captured says the more.
    """
    inputs = (_provenance(entry).get("recipe") or {}).get("inputs") or INPUTS[0]
    if inputs == INPUTS[0] or (inputs == "captured" and find_op(entry.op).routed):
        return []
    return [f"inputs: {entry.id} holds for {inputs}, rows are measured with {INPUTS[0]}"]


def _differences(entry: LedgerEntry, mock: Manifest, gpu: str) -> list[str]:
    """Where the built mock is not what the verdict holds for."""
    version = mock.versions.get(FRAMEWORKS.get(entry.backend, entry.backend), "")
    told = _provenance(entry)
    model, versions = told.get("model") or {}, told.get("versions") or {}
    pairs: list[tuple[str, Any, Any]] = [
        (f"{entry.backend} version", entry.framework, version),
        ("GPU", entry.gpu, gpu),
        # Libraries of torch's own choose and bring kernels too.
        *((name, versions.get(name), mock.versions.get(name)) for name in ("torch", "cuda")),
        ("architecture", entry.architecture, mock.model.get("architecture", "")),
        ("model configuration", model.get("config_sha256"), mock.model.get("config_sha256")),
        ("engine flags", tuple(told.get("engine_args") or ()), tuple(mock.engine_args)),
    ]
    dtypes: dict[str, str] = json.loads(entry.dtypes)
    pairs += [
        (f"dtype of {name}", dtypes.get(name), mock.dtypes.get(name))
        for name in sorted(dtypes.keys() | mock.dtypes.keys())
    ]
    # What a verdict does not tell, it does not hold for.
    found = [
        f"{what}: {entry.id} holds for {_shown(aligned)}, this is {_shown(here)}"
        for what, aligned, here in pairs
        if (aligned or None) != (here or None)
    ]
    aligned_source: dict[str, str] = json.loads(entry.layer_source)
    changed = sorted(
        name
        for name in aligned_source.keys() | mock.layer_source.keys()
        if aligned_source.get(name) != mock.layer_source.get(name)
    )
    if changed:
        more = f" and {len(changed) - _SHOWN_FILES} more" if len(changed) > _SHOWN_FILES else ""
        found.append(
            f"layer source: changed since {entry.id}: {', '.join(changed[:_SHOWN_FILES])}{more}"
        )
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return str(value) if value else "unknown"


def _model(entry: LedgerEntry) -> str:
    """Digest of the model's configuration; empty when the verdict does not tell."""
    return str((_provenance(entry).get("model") or {}).get("config_sha256") or "")


def _provenance(entry: LedgerEntry) -> dict[str, Any]:
    return entry.alignment().provenance
