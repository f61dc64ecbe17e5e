"""The tokens that both sides of an alignment run: prompts from a seed, and the engine's answers.

Activations decide how long the data-dependent kernels take and how much power the GEMMs draw, so
mock and serving run are given the same tokens. Pure Python: the server's runner has no torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from opkit.layers.manifest import Answer
from opkit.layers.op import Case, Phase


def prompt_tokens(seed: int, request: int, length: int, vocab: int) -> list[int]:
    """The token ids of one prompt, uniform over the vocabulary.

    A longer prompt of the same ``seed`` and ``request`` begins with the shorter one.

    Args:
        seed: the run's seed.
        request: number of the request within its wave, from 0.
        length: tokens wanted.
        vocab: size of the vocabulary; ids are 0 to ``vocab - 1``.
    """
    # Seeding with a string goes through SHA-512: the same on every platform and Python version.
    stream = random.Random(f"opkit prompt {seed} {request}")
    return [stream.randrange(vocab) for _ in range(length)]


class Sequences:
    """Token ids of a case's requests, kept: drawing them costs more than a decode step.

    Args:
        seed: of the prompts.
        vocab: size of the vocabulary.
        answers: what the engine answered; its decode steps were given these tokens.
    """

    def __init__(self, seed: int, vocab: int, answers: Sequence[Answer] = ()) -> None:
        self._seed, self._vocab, self._answers = seed, vocab, answers
        self._answer: Answer | None = None
        self._kept: dict[int, list[int]] = {}

    def select(self, case: Case) -> None:
        """Take the wave that the case's step belongs to: of those that fit the smallest."""
        decoding = case.phase is Phase.GENERATION
        fitting = [a for a in self._answers if decoding and a.includes(case.batch, case.past)]
        found = min(fitting, key=lambda answer: len(answer.tokens), default=None)
        if found is not self._answer:
            self._answer, self._kept = found, {}

    def tokens(self, request: int, length: int) -> list[int]:
        """The first ``length`` token ids of a request: its prompt, and what was answered to it.

        Without an answer, and after its end, they go on as a longer prompt would.
        """
        kept = self._kept.get(request, [])
        if len(kept) < length:
            kept = prompt_tokens(self._seed, request, length, self._vocab)
            if self._answer is not None and request < len(self._answer.tokens):
                start, answered = self._answer.prompt, self._answer.tokens[request]
                kept[start : start + len(answered)] = answered[: max(0, length - start)]
            self._kept[request] = kept
        return kept[:length]
