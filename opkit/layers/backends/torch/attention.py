"""The mocks of latent attention: what dsa and mla have in common."""

from __future__ import annotations

from typing import Any

from opkit.errors import BadInput
from opkit.layers.backends.torch.indexer import CACHE as INDEXER_CACHE
from opkit.layers.backends.torch.indexer import LightningIndexer
from opkit.layers.backends.torch.latent import CACHE, LatentAttention
from opkit.layers.backends.torch.mock import CacheShape, TorchMock
from opkit.layers.backends.torch.rope import Rope, scaling_of
from opkit.layers.dsa import projections
from opkit.layers.geometry import Indexer, Latent
from opkit.layers.manifest import Operand
from opkit.layers.op import Case
from opkit.layers.operands import sample
from opkit.layers.plan import PlannedCase


class LatentMock(TorchMock):
    """Latent attention as ``self_attn`` of one rank; subclasses say whether it is sparse."""

    sparse: bool

    def require(self) -> None:
        """See :meth:`TorchMock.require`."""
        if self.geometry.latent is None:
            raise BadInput(f"{self.origin}: no latent attention", "its attention is op gqa")
        if self.sparse and self.geometry.indexer is None:
            raise BadInput(f"{self.origin}: no indexer, its attention is dense", "it is op mla")

    def build(self) -> Any:
        """See :meth:`TorchMock.build`."""
        length = max(
            planned.case.past + planned.case.tokens
            for planned in self.plan.cases
            if isinstance(planned.case, Case)
        )
        rope = Rope(
            self._latent.qk_rope_head_dim,
            self.geometry.rope_theta,
            length,
            scaling_of(self.config),
            self.device,
            self.wide,
        )
        indexer = None
        if self.sparse:
            interleaved = bool(self.config.get("indexer_rope_interleave", False))
            indexer = LightningIndexer(self.geometry, self.weights, rope, interleaved)
        return LatentAttention(self.geometry, self.weights, rope, indexer)

    def caches(self) -> tuple[CacheShape, ...]:
        """See :meth:`TorchMock.caches`."""
        latent = CacheShape(CACHE, (self._latent.kv_lora_rank + self._latent.qk_rope_head_dim,))
        if not self.sparse:
            return (latent,)
        return latent, CacheShape(INDEXER_CACHE, (self._indexer.head_dim,))

    def model(self) -> dict[str, Any]:
        """See :meth:`TorchMock.model`."""
        found = {
            "num_heads": self.geometry.heads,
            "hidden_size": self.geometry.hidden_size,
            **vars(self._latent),
        }
        if self.sparse:
            found |= {
                "index_n_heads": self._indexer.heads,
                "index_head_dim": self._indexer.head_dim,
                "index_topk": self._indexer.topk,
            }
        return found

    def elements(self) -> int:
        """See :meth:`TorchMock.elements`."""
        found = projections(self.model())
        if self.sparse:
            heads, size = self._indexer.heads, self._indexer.head_dim
            found += self._latent.q_lora_rank * heads * size
            found += self.geometry.hidden_size * (size + heads)
        return found

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`TorchMock.operands`; also what the indexer's scores are made of."""
        if not self.sparse:
            return super().operands(planned)
        calls: list[Any] = []
        handle = self.module.indexer.score.register_forward_pre_hook(
            lambda _, arguments: calls.append(arguments)
        )
        try:
            found = super().operands(planned)
        finally:
            handle.remove()
        # Of the step's last part, a row a token.
        named = zip(("q", "k", "weights"), calls[-1], strict=True)
        prefix = f"{planned.case.phase} indexer.score"
        return (*found, *(sample(f"{prefix}.{name}", value.flatten(0, 1)) for name, value in named))

    def notes(self) -> tuple[str, ...]:
        """See :meth:`TorchMock.notes`."""
        dense = "dense attention: per head in context, absorbed into the latent in generation"
        if not self.sparse:
            return (dense,)
        return (
            "left out of the indexer: FP8 quantisation of its queries and keys, and the Hadamard "
            "rotation before it (orthogonal: it changes no unquantised score)",
            "sparse attention in absorbed form in both phases; picked entries are gathered",
        )

    @property
    def _latent(self) -> Latent:
        assert self.geometry.latent is not None
        return self.geometry.latent

    @property
    def _indexer(self) -> Indexer:
        assert self.geometry.indexer is not None
        return self.geometry.indexer
