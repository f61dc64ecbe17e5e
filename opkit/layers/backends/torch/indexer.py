"""DeepSeek's lightning indexer: which tokens a query attends to.

Source: DeepSeek-V3.2-Exp technical report (2025), equation 1, and its ``inference/model.py``. Left
out are the FP8 quantisation of queries and keys and the Hadamard rotation that prepares for it:
without quantisation the rotation, being orthogonal, changes no score.
"""

from __future__ import annotations

from typing import Any

import torch

from opkit.layers.backends.torch.draw import Weights
from opkit.layers.backends.torch.rope import Rope
from opkit.layers.backends.torch.step import Step
from opkit.layers.geometry import Geometry

CACHE = "indexer_cache"
_NORM_EPS = 1e-6  # of the key's layer norm, in DeepSeek's and vLLM's code


class IndexerScore(torch.nn.Module):  # type: ignore[misc]  # torch is untyped where it is absent
    """Weighs the heads' products with every cached key."""

    def forward(self, queries: Any, keys: Any, weights: Any) -> Any:
        """Scores [b, t, s], in float32 or wider: the sum over heads of weight * ReLU(q·k).

        Args:
            queries: [b, t, heads, size]. keys: [b, s, size]. weights: [b, t, heads], wide.
        """
        batch, tokens, heads, size = queries.shape
        products = queries.reshape(batch, tokens * heads, size) @ keys.transpose(1, 2)
        parts = products.relu_().view(batch, tokens, heads, -1).to(weights.dtype)
        return (weights.unsqueeze(2) @ parts).squeeze(2)


class LightningIndexer(torch.nn.Module):  # type: ignore[misc]
    """Scores every cached token for every new one and picks the best.

    Args:
        geometry: a model with an indexer; its heads are never shared by ranks.
        weights: draws the parameters.
        rope: rotates the leading elements of queries and keys.
        interleaved: how rope pairs elements here: DeepSeek does not interleave, GLM does.
    """

    def __init__(
        self, geometry: Geometry, weights: Weights, rope: Rope, interleaved: bool = False
    ) -> None:
        super().__init__()
        assert geometry.indexer is not None
        assert geometry.latent is not None
        self.shape, self.rope, self.interleaved = geometry.indexer, rope, interleaved
        self.rotated = geometry.latent.qk_rope_head_dim
        heads, size = self.shape.heads, self.shape.head_dim
        hidden, rank = geometry.hidden_size, geometry.latent.q_lora_rank
        self.wq_b = weights.linear("indexer.wq_b", rank, heads * size)
        self.wk = weights.linear("indexer.wk", hidden, size)
        self.k_norm = weights.layer_norm("indexer.k_norm", size, _NORM_EPS)
        self.weights_proj = weights.linear("indexer.weights_proj", hidden, heads)
        self.score = IndexerScore()
        self.wide = torch.promote_types(weights.dtype, torch.float32)

    def write(self, hidden: Any, step: Step) -> None:
        """Put the new tokens' keys into the indexer's cache."""
        keys = self.k_norm(self.wk(hidden)).unsqueeze(1)
        step.store(CACHE, self._turned(keys, step.positions))

    def queries(self, hidden: Any, compressed: Any, step: Step) -> tuple[Any, Any]:
        """The new tokens' queries [batch, tokens, heads, size] and weights of their heads."""
        heads, size = self.shape.heads, self.shape.head_dim
        queries = self._turned(self.wq_b(compressed).view(-1, heads, size), step.positions)
        scale = (heads * size) ** -0.5
        weights = self.weights_proj(hidden).to(self.wide) * scale
        return (
            queries.view(step.batch, step.tokens, heads, size),
            weights.view(step.batch, step.tokens, heads),
        )

    def pick(self, queries: Any, weights: Any, keys: Any, first: int) -> tuple[Any, Any]:
        """The tokens that each query attends to.

        Args:
            queries, weights: of some consecutive tokens, see :meth:`queries`.
            keys: of all tokens up to the last of them, [requests, seen, size].
            first: position of the first query's token.

        Returns:
            Positions [requests, tokens, min(topk, seen)], in no order, and whether each is one that
            its query may see: an early query sees fewer tokens than are picked.
        """
        tokens, seen = queries.shape[1], keys.shape[1]
        scores = self.score(queries, keys, weights)
        places = torch.arange(seen, device=keys.device)
        later = places > places[first : first + tokens].unsqueeze(1)
        best = scores.masked_fill(later, -torch.inf).topk(min(self.shape.topk, seen), sorted=False)
        return best.indices, best.values > -torch.inf

    def bytes_a_token(self, seen: int) -> int:
        """Largest intermediate of one query's scores over ``seen`` keys, bytes."""
        return self.shape.heads * seen * int(self.wide.itemsize)

    def _turned(self, values: Any, positions: Any) -> Any:
        """Rope on the leading elements of [tokens, heads, size]."""
        turned = self.rope(values[..., : self.rotated], positions, self.interleaved)
        return torch.cat((turned, values[..., self.rotated :]), dim=-1)
