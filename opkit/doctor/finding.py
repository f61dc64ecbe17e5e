"""What the doctor says: findings as plain data, and how grave they are together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How grave a finding is, from best to worst in the order of :data:`GRAVITY`."""

    OK = "ok"
    UNKNOWN = "unknown"  # it could not be told: no GPU, no permission, not asked for
    WARN = "warn"  # a run goes through, its numbers or its duration may suffer
    FAIL = "fail"  # it would spoil or stop a run


GRAVITY = (Status.OK, Status.UNKNOWN, Status.WARN, Status.FAIL)


class Group(StrEnum):
    """What a finding is about; the order of the report."""

    NSYS = "nsys"
    GPU = "gpu"
    HOST = "host"
    FRAMEWORKS = "frameworks"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: short and stable: scripts may ask for it.
        status: how grave it is.
        says: what was seen, with units.
        fix: what to do; a command where there is one. Empty when it is ok.
        group: what it is about.
    """

    name: str
    status: Status
    says: str
    fix: str = ""
    group: Group = Group.HOST


@dataclass(frozen=True)
class Diagnosis:
    """All findings of an examination, in the order of the report."""

    findings: tuple[Finding, ...]

    def of(self, group: Group) -> tuple[Finding, ...]:
        """The findings of a group."""
        return tuple(finding for finding in self.findings if finding.group is group)

    def with_status(self, status: Status) -> tuple[Finding, ...]:
        """The findings of that status."""
        return tuple(finding for finding in self.findings if finding.status is status)

    def counts(self) -> dict[Status, int]:
        """How many there are of each status, the gravest first."""
        counted = Counter(finding.status for finding in self.findings)
        return {status: counted[status] for status in reversed(GRAVITY)}

    def spoiled(self, strict: bool = False) -> bool:
        """Whether a run would be spoiled; ``strict``: warnings count too."""
        grave = (Status.FAIL, Status.WARN) if strict else (Status.FAIL,)
        return any(finding.status in grave for finding in self.findings)


def worst(statuses: list[Status]) -> Status:
    """The gravest of them; ok when there is none."""
    return max(statuses, key=GRAVITY.index, default=Status.OK)
