"""The prompts that both sides of an alignment send: the same token ids, from the same seed.

Activations decide how long the data-dependent kernels take and how much power the GEMMs draw, so
mock and serving run are given the same tokens. Pure Python: the server's runner has no torch.
"""

from __future__ import annotations

import random


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
