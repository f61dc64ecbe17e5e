"""Where the numbers come from: weights by recipe, and inputs by token.

Every tensor has a generator of its own, seeded by the plan's seed and the tensor's name: what one
tensor holds depends on no other, on no order, and on no case. Generators of a CPU and of a GPU give
different numbers for the same seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from opkit.layers.prompts import prompt_tokens

# Deviation of a linear layer's weights, by recipe, from the number of its input features.
# fan_in (LeCun et al., "Efficient BackProp", 1998) keeps the variance of unit-variance inputs,
# whatever the model's size; 0.02 is how GPT-2 and most models since begin their training.
RECIPES: dict[str, Callable[[int], float]] = {
    "normal_fan_in": lambda inputs: float(inputs**-0.5),
    "normal_0.02": lambda _: 0.02,
}
_NORM_DEVIATION = 0.1  # of a norm's gains around 1 and shifts around 0: trained ones are not equal
# Rows of the two tables whose sums are the tokens' rows. Coprime: no two tokens of a vocabulary
# below their product (1,040,399) have the same pair.
_TABLES = (1021, 1019)
_BLOCK = 64  # positions of a request that are drawn together


def stream(device: torch.device, *name: object) -> torch.Generator:
    """A generator on ``device`` whose numbers follow from ``name`` alone."""
    text = " ".join(str(part) for part in ("opkit torch", *name))
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.Generator(device).manual_seed(seed)


class Weights:
    """Draws a layer's weights.

    Args:
        seed: the plan's.
        device: where they are made.
        dtype: element type.
        recipe: one of ``RECIPES``.
    """

    def __init__(
        self, seed: int, device: torch.device, dtype: torch.dtype, recipe: str = "normal_fan_in"
    ) -> None:
        self.seed, self.device, self.dtype, self.recipe = seed, device, dtype, recipe

    def matrix(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """Weights [..., outputs, inputs], normal with the recipe's deviation."""
        made = torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)
        deviation = RECIPES[self.recipe](shape[-1])
        # One matrix at a time: a model's experts are more elements than 32 bits count.
        for number, part in enumerate(made.view(-1, *shape[-2:])):
            part.normal_(0, deviation, generator=stream(self.device, self.seed, name, number))
        return made

    def linear(
        self, name: str, inputs: int, outputs: int, dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """A linear layer without bias."""
        layer = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        drawn = self.matrix(name, outputs, inputs, dtype=dtype)
        layer.weight = torch.nn.Parameter(drawn, requires_grad=False)
        return layer

    def rms_norm(self, name: str, size: int, eps: float) -> torch.nn.RMSNorm:
        """An RMS norm whose gains lie around 1."""
        norm = torch.nn.RMSNorm(size, eps=eps, device="meta")
        norm.weight = self._gains(name, size, 1.0)
        return norm

    def layer_norm(self, name: str, size: int, eps: float) -> torch.nn.LayerNorm:
        """A layer norm whose gains lie around 1 and whose shifts around 0."""
        norm = torch.nn.LayerNorm(size, eps=eps, device="meta")
        norm.weight = self._gains(name, size, 1.0)
        norm.bias = self._gains(f"{name}.bias", size, 0.0)
        return norm

    def described(self) -> str:
        """The recipe, for the manifest."""
        deviation = "1/sqrt(inputs)" if self.recipe == "normal_fan_in" else "0.02"
        return (
            f"{self.recipe}: linear layers normal(0, {deviation}); norms' gains normal(1, "
            f"{_NORM_DEVIATION}), shifts normal(0, {_NORM_DEVIATION}); torch.Generator of the "
            f"{self.device.type}, seeded by {self.seed} and the parameter's name"
        )

    def _gains(self, name: str, size: int, mean: float) -> torch.nn.Parameter:
        made = torch.empty(size, dtype=self.dtype, device=self.device)
        made.normal_(mean, _NORM_DEVIATION, generator=stream(self.device, self.seed, name))
        return torch.nn.Parameter(made, requires_grad=False)


class Inputs:
    """Draws the rows of activations that stand for tokens: near unit variance, as after a norm.

    A request's row at a position is the same in every case that has this position.

    Args:
        kind: ``tokens``, ``normal``, ``zeros`` or ``rows``, see :data:`opkit.layers.plan.INPUTS`.
        seed: the plan's.
        vocab: size of the vocabulary.
        width: elements of a row.
        device, dtype: where and as what they are made.
        name: what they are the input of; another name has other rows.
    """

    def __init__(
        self,
        kind: str,
        seed: int,
        vocab: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "hidden_states",
    ) -> None:
        self.kind, self.seed, self.vocab, self.width = kind, seed, vocab, width
        self.device, self.dtype, self.name = device, dtype, name
        self._prompts: dict[int, list[int]] = {}
        self._tables = [
            torch.randn(
                size, width, dtype=dtype, device=device, generator=stream(device, seed, name, size)
            ).mul_(0.5**0.5)
            for size in _TABLES
            if kind in ("tokens", "rows")
        ]

    def rows(self, requests: range, start: int, count: int) -> Any:
        """Rows [requests * count, width]: positions from ``start`` on of each request in turn."""
        shape = (len(requests) * count, self.width)
        if self.kind == "zeros":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.kind == "normal":
            return torch.cat([self._normal(request, start, count) for request in requests])
        if self.kind == "rows":
            ids = torch.zeros(shape[0], dtype=torch.int64, device=self.device)
        else:
            known = [self._prompt(request, start, count) for request in requests]
            ids = torch.tensor(known, dtype=torch.int64).flatten().to(self.device)
        one, other = self._tables
        return one[ids % _TABLES[0]] + other[ids % _TABLES[1]]

    def described(self) -> str:
        """The recipe, for the manifest."""
        tables = f"sums of rows of two normal tables ({_TABLES[0]} and {_TABLES[1]} rows), "
        return {
            "tokens": f"prompt_tokens(seed={self.seed}, request 0 to batch-1); a token's row is "
            f"one of {self.vocab:,} {tables}variance 1",
            "normal": f"normal(0, 1), seed {self.seed}, by request and position",
            "zeros": "zeros: degenerate on purpose",
            "rows": "all rows equal: degenerate on purpose",
        }[self.kind]

    def _prompt(self, request: int, start: int, count: int) -> list[int]:
        """A piece of ``prompt_tokens``, kept: drawing them again costs more than a decode step."""
        kept = self._prompts.get(request, [])
        if len(kept) < start + count:
            length = max(start + count, 2 * len(kept))  # each is drawn from its beginning
            kept = self._prompts[request] = prompt_tokens(self.seed, request, length, self.vocab)
        return kept[start : start + count]

    def _normal(self, request: int, start: int, count: int) -> Any:
        """Rows of one request, cut out of the blocks that hold them."""
        first = start // _BLOCK
        blocks = [
            torch.randn(
                _BLOCK,
                self.width,
                dtype=self.dtype,
                device=self.device,
                generator=stream(self.device, self.seed, self.name, request, block),
            )
            for block in range(first, -(-(start + count) // _BLOCK))
        ]
        return torch.cat(blocks)[start - first * _BLOCK :][:count]
