"""One step of the engine that a case stands for: its tokens, its places in the caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# Largest intermediate of an attention over many queries, bytes: further queries wait their turn.
_TILE_BYTES = {"cuda": 2**29, "cpu": 2**26}


@dataclass(frozen=True)
class Step:
    """New tokens of some requests, all with the same past.

    Attributes:
        batch: requests.
        tokens: new tokens of each.
        past: tokens of each that are cached already.
        positions: of all new tokens in their requests, request after request, [batch * tokens].
        caches: by name, [batch, at least past + tokens, ...]: a slot for each token.
    """

    batch: int
    tokens: int
    past: int
    positions: Any
    caches: Mapping[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of a request after the step."""
        return self.past + self.tokens

    def store(self, name: str, entries: Any) -> None:
        """Write ``entries`` [batch * tokens, ...] to the new tokens' slots of a cache."""
        slots = self.caches[name][:, self.past : self.length]
        slots.copy_(entries.view(slots.shape))

    def seen(self, name: str) -> Any:
        """A cache's slots up to the last new token, [batch, length, ...]; a view."""
        return self.caches[name][:, : self.length]


def make_step(
    batch: int, tokens: int, past: int, caches: Mapping[str, Any], device: torch.device
) -> Step:
    """A step with its positions."""
    positions = torch.arange(past, past + tokens, device=device).repeat(batch)
    return Step(batch, tokens, past, positions, caches)


def tiles(step: Step, bytes_a_token: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut a step's tokens into parts whose intermediates stay small.

    Args:
        step: the step.
        bytes_a_token: largest intermediate of one new token.
        device: where it is to be held.

    Yields:
        Requests and tokens of a part: some whole requests, or some tokens of one request.
    """
    room = max(1, _TILE_BYTES[device.type] // bytes_a_token)
    requests, tokens = max(1, room // step.tokens), min(room, step.tokens)
    for first in range(0, step.batch, requests):
        for start in range(0, step.tokens, tokens):
            yield (
                slice(first, min(first + requests, step.batch)),
                slice(start, min(start + tokens, step.tokens)),
            )
