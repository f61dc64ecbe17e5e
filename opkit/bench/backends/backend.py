"""What the benchmark asks of an engine, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Served:
    """An engine that is ready.

    Attributes:
        model: its name.
        version: the engine's; empty: not told.
        vocab: size of the vocabulary; 0: not told.
        max_length: tokens of prompt and output together; 0: not told.
        timed_by: whose clock the first and last tokens were dated with, in words.
        facts: anything else worth keeping, as plain data.
    """

    model: str
    version: str = ""
    vocab: int = 0
    max_length: int = 0
    timed_by: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """One request's tokens in time. Times are ns of the system's monotonic clock.

    Attributes:
        first_ns, last_ns: when its first and last tokens were there; None: not told.
        tokens: output tokens that came back.
        first_tokens: how many came with the first ones.
        gaps: pairs of ns since the tokens before, and how many came then.
        cached: prompt tokens that the engine took from its prefix cache; None: not told.
    """

    first_ns: int | None
    last_ns: int | None
    tokens: int
    first_tokens: int = 1
    gaps: tuple[tuple[int, int], ...] = ()
    cached: int | None = None


@dataclass(frozen=True)
class Turn:
    """All requests of one repetition, from before the first was sent to when the last had ended."""

    began_ns: int
    ended_ns: int
    replies: tuple[Reply, ...]


class Backend(Protocol):
    """One engine. ``close`` may be called at any time, also twice."""

    def start(self) -> Served:
        """Get it ready.

        Raises:
            OpkitError: it cannot be started or reached.
        """

    def generate(self, prompts: Sequence[Sequence[int]], output: int) -> Turn:
        """Answer all prompts at once with ``output`` tokens each.

        Raises:
            RunFailed: it failed, died, took too long, or gave another number of tokens.
        """

    def alive(self) -> bool:
        """Whether another ``generate`` makes sense after one has failed."""

    def close(self) -> None:
        """End everything that was started."""
