"""Multi-head latent attention, dense or over the tokens that an indexer picks.

Source: DeepSeek-V2 (2024), section 2.1 and appendix C (the absorbed form); DeepSeek-V3.2-Exp
(2025) for the sparse one. Parameters have the names of the models' checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from opkit.layers.backends.torch.draw import Weights
from opkit.layers.backends.torch.indexer import CACHE as INDEXER_CACHE
from opkit.layers.backends.torch.indexer import LightningIndexer
from opkit.layers.backends.torch.rope import Rope
from opkit.layers.backends.torch.step import Step, tiles
from opkit.layers.geometry import Geometry

CACHE = "kv_cache"


class LatentAttention(torch.nn.Module):  # type: ignore[misc]  # torch is untyped where it is absent
    """The ``self_attn`` module of DeepSeek's models.

    Args:
        geometry: one rank's part of a model with latent attention.
        weights: draws the parameters.
        rope: rotates the positional part of queries and keys.
        indexer: picks tokens; None for dense attention.
    """

    def __init__(
        self,
        geometry: Geometry,
        weights: Weights,
        rope: Rope,
        indexer: LightningIndexer | None = None,
    ) -> None:
        super().__init__()
        assert geometry.latent is not None
        self.shape, self.heads, self.rope = geometry.latent, geometry.heads, rope
        shape, heads, hidden = self.shape, self.heads, geometry.hidden_size
        query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
        self.width = shape.kv_lora_rank + shape.qk_rope_head_dim  # of a cache entry
        self.scale = query**-0.5 * rope.logit_scale
        self.wide = torch.promote_types(weights.dtype, torch.float32)
        self.q_a_proj = weights.linear("q_a_proj", hidden, shape.q_lora_rank)
        self.q_a_layernorm = weights.rms_norm("q_a_layernorm", shape.q_lora_rank, geometry.norm_eps)
        self.q_b_proj = weights.linear("q_b_proj", shape.q_lora_rank, heads * query)
        self.kv_a_proj_with_mqa = weights.linear("kv_a_proj_with_mqa", hidden, self.width)
        self.kv_a_layernorm = weights.rms_norm(
            "kv_a_layernorm", shape.kv_lora_rank, geometry.norm_eps
        )
        self.kv_b_proj = weights.linear(
            "kv_b_proj", shape.kv_lora_rank, heads * (shape.qk_nope_head_dim + shape.v_head_dim)
        )
        self.o_proj = weights.linear("o_proj", heads * shape.v_head_dim, hidden)
        self.indexer = indexer

    def write(self, hidden: Any, step: Step) -> None:
        """Put the new tokens into the caches; nothing in them depends on attention."""
        latent, shared = self.kv_a_proj_with_mqa(hidden).split(
            (self.shape.kv_lora_rank, self.shape.qk_rope_head_dim), dim=-1
        )
        turned = self.rope(shared.unsqueeze(1), step.positions).squeeze(1)
        step.store(CACHE, torch.cat((self.kv_a_layernorm(latent), turned), dim=-1))
        if self.indexer is not None:
            self.indexer.write(hidden, step)

    def forward(self, hidden_states: Any, step: Step) -> Any:
        """One step: [batch * tokens, hidden_size] to the same shape."""
        self.write(hidden_states, step)
        compressed = self.q_a_layernorm(self.q_a_proj(hidden_states))
        plain, turned = (
            self.q_b_proj(compressed)
            .view(hidden_states.shape[0], self.heads, -1)
            .split((self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim), dim=-1)
        )
        turned = self.rope(turned, step.positions)
        if self.indexer is not None:
            chosen = self.indexer.queries(hidden_states, compressed, step)
            attended = self._released(self._sparse(self._absorbed(plain, turned), *chosen, step))
        elif step.tokens == 1:
            attended = self._released(self._decode(self._absorbed(plain, turned), step))
        else:
            attended = self._per_head(torch.cat((plain, turned), dim=-1), step)
        return self.o_proj(attended.reshape(hidden_states.shape[0], -1))

    def _up(self) -> tuple[Any, Any]:
        """From the latent to a head's keys [heads, nope, rank] and values [heads, v, rank]."""
        weight = self.kv_b_proj.weight.view(self.heads, -1, self.shape.kv_lora_rank)
        keys, values = weight.split((self.shape.qk_nope_head_dim, self.shape.v_head_dim), dim=1)
        return keys, values

    def _absorbed(self, plain: Any, turned: Any) -> Any:
        """Queries that meet cache entries directly, [tokens, heads, width]."""
        absorbed = torch.einsum("thd,hdr->thr", plain, self._up()[0])
        return torch.cat((absorbed, turned), dim=-1)

    def _released(self, attended: Any) -> Any:
        """Values of each head, [tokens, heads, v_head_dim], out of attended latents."""
        return torch.einsum("thr,hvr->thv", attended, self._up()[1])

    def _attend(self, queries: Any, entries: Any, visible: Any = None) -> Any:
        """Attention of queries [n, heads, width] to entries [n, k, width] of their own."""
        logits = (queries @ entries.transpose(1, 2)).to(self.wide) * self.scale
        if visible is not None:
            logits = logits.masked_fill(~visible.unsqueeze(1), -torch.inf)
        shares = logits.softmax(dim=-1).to(entries.dtype)
        return shares @ entries[..., : self.shape.kv_lora_rank]

    def _decode(self, queries: Any, step: Step) -> Any:
        """Dense attention of one token a request, absorbed: multi-query over the latents."""
        cache = step.seen(CACHE)
        largest = self.heads * step.length * self.wide.itemsize
        parts = [
            self._attend(queries[requests], cache[requests])
            for requests, _ in tiles(step, largest, queries.device)
        ]
        return torch.cat(parts)

    def _per_head(self, queries: Any, step: Step) -> Any:
        """Dense attention of many tokens, with each head's own keys and values, as in a prefill."""
        cache, shape = step.seen(CACHE), self.shape
        latent, turned = cache.split((shape.kv_lora_rank, shape.qk_rope_head_dim), dim=-1)
        expanded = self.kv_b_proj(latent).view(step.batch, step.length, self.heads, -1)
        plain, values = expanded.split((shape.qk_nope_head_dim, shape.v_head_dim), dim=-1)
        shared = turned.unsqueeze(2).expand(-1, -1, self.heads, -1)
        keys = torch.cat((plain, shared), dim=-1)
        by_request = queries.view(step.batch, step.tokens, self.heads, -1)
        places = torch.arange(step.length, device=cache.device)
        mask = places <= places[step.past :].unsqueeze(1) if step.past else None
        attended = scaled_dot_product_attention(
            by_request.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
        )
        return attended.transpose(1, 2)

    def _sparse(self, queries: Any, chosen: Any, weights: Any, step: Step) -> Any:
        """Attention to the tokens that the indexer picks, absorbed, part by part."""
        assert self.indexer is not None
        entries = step.caches[CACHE]
        flat = entries.flatten(0, 1)  # slots of all requests
        by_request = queries.view(step.batch, step.tokens, self.heads, self.width)
        attended = torch.empty_like(by_request[..., : self.shape.kv_lora_rank])
        picks = min(self.indexer.shape.topk, step.length)
        largest = max(
            self.indexer.bytes_a_token(step.length),
            picks * self.width * entries.element_size(),
            picks * self.heads * self.wide.itemsize,
        )
        for requests, tokens in tiles(step, largest, queries.device):
            keys = step.caches[INDEXER_CACHE][requests, : step.past + tokens.stop]
            picked, visible = self.indexer.pick(
                chosen[requests, tokens], weights[requests, tokens], keys, step.past + tokens.start
            )
            offsets = torch.arange(requests.start, requests.stop, device=flat.device)
            slots = picked + (offsets * entries.shape[1]).view(-1, 1, 1)
            gathered = flat[slots.flatten(0, 1)]
            part = by_request[requests, tokens]
            found = self._attend(part.flatten(0, 1), gathered, visible.flatten(0, 1))
            attended[requests, tokens] = found.view(*part.shape[:3], -1)
        return attended.flatten(0, 1)
