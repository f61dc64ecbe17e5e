"""The grouped-query attention mock of plain torch: cache write and scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from opkit.errors import BadInput
from opkit.layers.backends.torch.draw import Inputs
from opkit.layers.backends.torch.mock import CacheShape, TorchMock
from opkit.layers.backends.torch.step import Step
from opkit.layers.geometry import Geometry
from opkit.layers.manifest import Operand
from opkit.layers.op import LaunchMode
from opkit.layers.operands import sample
from opkit.layers.plan import Plan, PlannedCase

_CACHE = "kv_cache"


class GroupedQueryAttention(torch.nn.Module):  # type: ignore[misc]  # untyped where it is absent
    """Attention of queries to cached keys and values that groups of heads share.

    torch chooses the kernel. A window in a context is a mask, for which torch has no grouped
    kernel: there each head gets a copy of its keys and values.
    """

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.group = geometry.heads // geometry.kv_heads
        self.window = geometry.sliding_window

    def write(self, key: Any, value: Any, step: Step) -> None:
        """Put the new tokens' keys and values into the cache."""
        step.store(_CACHE, torch.stack((key, value), dim=1))

    def forward(self, query: Any, key: Any, value: Any, step: Step) -> Any:
        """One step.

        Args:
            query: [batch * tokens, heads, size].
            key, value: [batch * tokens, kv_heads, size].
            step: tokens and cache [batch, length, 2, kv_heads, size].

        Returns:
            [batch * tokens, heads * size].
        """
        self.write(key, value, step)
        oldest = max(0, step.past + 1 - self.window) if self.window else 0
        cache = step.seen(_CACHE)[:, oldest:].permute(2, 0, 3, 1, 4)
        queries = query.view(step.batch, step.tokens, *query.shape[1:]).transpose(1, 2)
        attended = self._attend(queries, cache[0], cache[1], step, oldest)
        return attended.transpose(1, 2).reshape(query.shape[0], -1)

    def _attend(self, queries: Any, keys: Any, values: Any, step: Step, oldest: int) -> Any:
        """Causal attention, [batch, heads, tokens, size]; keys begin at position ``oldest``."""
        grouped = self.group > 1
        if step.tokens == 1:
            return scaled_dot_product_attention(queries, keys, values, enable_gqa=grouped)
        if self.window and step.length > self.window:
            places = torch.arange(oldest, step.length, device=queries.device)
            back = places[step.past - oldest :].unsqueeze(1) - places
            mask = (back >= 0) & (back < self.window)
            return scaled_dot_product_attention(
                queries,
                keys.repeat_interleave(self.group, dim=1),
                values.repeat_interleave(self.group, dim=1),
                attn_mask=mask,
            )
        if step.past:
            mask = causal_lower_right(step.tokens, step.length)
            return scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, enable_gqa=grouped
            )
        return scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=grouped
        )


class GqaMock(TorchMock):
    """See :class:`opkit.layers.mock.Mock`."""

    def require(self) -> None:
        """See :meth:`TorchMock.require`."""
        if self.geometry.latent is not None:
            raise BadInput(f"{self.origin}: its attention is latent", "it is op mla or dsa")

    def build(self) -> Any:
        """See :meth:`TorchMock.build`."""
        return GroupedQueryAttention(self.geometry)

    def build_inputs(self) -> Inputs:
        """Queries, keys and values of a token, side by side."""
        heads = self.geometry.heads + 2 * self.geometry.kv_heads
        return self._drawn(heads * self.geometry.head_dim, "qkv")

    def arguments(self, rows: Any) -> dict[str, Any]:
        """See :meth:`TorchMock.arguments`."""
        by_head = rows.view(rows.shape[0], -1, self.geometry.head_dim)
        sizes = (self.geometry.heads, self.geometry.kv_heads, self.geometry.kv_heads)
        query, key, value = (part.contiguous() for part in by_head.split(sizes, dim=1))
        return {"query": query, "key": key, "value": value}

    def write(self, inputs: Mapping[str, Any], step: Step) -> None:
        """See :meth:`TorchMock.write`."""
        self.module.write(inputs["key"], inputs["value"], step)

    def caches(self) -> tuple[CacheShape, ...]:
        """See :meth:`TorchMock.caches`."""
        entry = (2, self.geometry.kv_heads, self.geometry.head_dim)
        return (CacheShape(_CACHE, entry, self.geometry.sliding_window),)

    def output_shape(self, tokens: int) -> tuple[int, ...]:
        """See :meth:`TorchMock.output_shape`."""
        return tokens, self.geometry.heads * self.geometry.head_dim

    def operands(self, planned: PlannedCase[Any]) -> tuple[Operand, ...]:
        """See :meth:`opkit.layers.mock.Mock.operands`: what the attention multiplies."""
        self.prepare(PlannedCase(planned.case, LaunchMode.EAGER))
        phase = planned.case.phase
        found = [sample(f"{phase} {name}", value) for name, value in self.inputs.items()]
        if planned.case.past and self._step is not None:
            cached = self._step.caches[_CACHE][:, : planned.case.past].flatten(0, 1)
            found.append(sample(f"{phase} {_CACHE}", cached))
        return tuple(found)

    def model(self) -> dict[str, Any]:
        """See :meth:`TorchMock.model`."""
        return {
            "num_heads": self.geometry.heads,
            "num_kv_heads": self.geometry.kv_heads,
            "head_dim": self.geometry.head_dim,
            "window_size": self.geometry.sliding_window,
            "hidden_size": self.geometry.hidden_size,
        }

    def elements(self) -> int:
        """See :meth:`TorchMock.elements`."""
        return 0

    def notes(self) -> tuple[str, ...]:
        """See :meth:`TorchMock.notes`."""
        return ("torch chooses the attention kernel; queries and keys are given, without rope",)

    def _recipe(self) -> dict[str, str]:
        drawn = super()._recipe()
        return {**drawn, "weights": "none: the op has no weights"}


def build(plan: Plan, dtype: str | None = None) -> GqaMock:
    """Build the mock that ``plan`` asks for; in another element type than the model's for tests.

    Raises:
        BadInput: the model's attention is latent, or see :class:`TorchMock`.
    """
    return GqaMock(plan, dtype)
