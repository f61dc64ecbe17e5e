"""Attention and experts once more, in float64, slowly and by the definitions.

Nothing here is absorbed, gathered, cached or batched: every token of a request is computed anew,
head by head, over all tokens, with a mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def rms(values: Any, gains: Any, eps: float) -> Any:
    return values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * gains


def turn(vector: Any, position: int, theta: float, interleaved: bool) -> Any:
    """One vector of a head, rotated to its position pair by pair."""
    size = len(vector)
    found = vector.clone()
    for pair in range(size // 2):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + size // 2)
        angle = position / theta ** (2 * pair / size)
        cos, sin = math.cos(angle), math.sin(angle)
        found[one] = vector[one] * cos - vector[other] * sin
        found[other] = vector[one] * sin + vector[other] * cos
    return found


def turned(rows: Any, theta: float, interleaved: bool = True) -> Any:
    """Rows [tokens, size] of one head, each at its own position."""
    return torch.stack([turn(row, place, theta, interleaved) for place, row in enumerate(rows)])


def causal(tokens: int, window: int = 0) -> Any:
    """Which token (row) sees which (column)."""
    seen = [
        [other <= one and (not window or one - other < window) for other in range(tokens)]
        for one in range(tokens)
    ]
    return torch.tensor(seen)


def attend(queries: Any, keys: Any, values: Any, mask: Any, scale: float) -> Any:
    """One head's masked attention, row by row."""
    found = []
    for row, query in enumerate(queries):
        seen = mask[row].nonzero().flatten()
        shares = (keys[seen] @ query * scale).exp()
        found.append((shares / shares.sum()) @ values[seen])
    return torch.stack(found)


def picked(weights: dict[str, Any], hidden: Any, compressed: Any, shape: Any, theta: float) -> Any:
    """Which token attends to which, by the lightning indexer's definition."""
    indexer, rope = shape.indexer, shape.latent.qk_rope_head_dim
    keys = hidden @ weights["indexer.wk.weight"].T
    spread = keys.var(-1, unbiased=False, keepdim=True)
    keys = (keys - keys.mean(-1, keepdim=True)) / (spread + 1e-6).sqrt()
    keys = keys * weights["indexer.k_norm.weight"] + weights["indexer.k_norm.bias"]
    keys = torch.cat((turned(keys[:, :rope], theta, False), keys[:, rope:]), 1)
    of_heads = (compressed @ weights["indexer.wq_b.weight"].T).split(indexer.head_dim, dim=1)
    importance = hidden @ weights["indexer.weights_proj.weight"].T
    importance = importance / math.sqrt(indexer.heads) / math.sqrt(indexer.head_dim)
    scores = torch.zeros(len(hidden), len(hidden), dtype=torch.float64)
    for head, queries in enumerate(of_heads):
        rotated = torch.cat((turned(queries[:, :rope], theta, False), queries[:, rope:]), 1)
        scores += importance[:, head : head + 1] * (rotated @ keys.T).clamp(min=0)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(len(hidden)):
        best = sorted(range(row + 1), key=lambda place: -scores[row, place].item())
        mask[row, best[: indexer.topk]] = True
    return mask


def latent_attention(mock: Any, hidden: Any, *, sparse: bool, theta: float = 10000.0) -> Any:
    """All tokens of one request through DeepSeek's ``self_attn``: [tokens, hidden] to the same."""
    weights = {name: value.double() for name, value in mock.module.named_parameters()}
    shape, eps = mock.geometry, mock.geometry.norm_eps
    latent = shape.latent
    nope, rope, size = latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim
    compressed = rms(hidden @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"], eps)
    queries = compressed @ weights["q_b_proj.weight"].T
    entries = hidden @ weights["kv_a_proj_with_mqa.weight"].T
    cached = rms(entries[:, : latent.kv_lora_rank], weights["kv_a_layernorm.weight"], eps)
    shared = turned(entries[:, latent.kv_lora_rank :], theta)
    expanded = cached @ weights["kv_b_proj.weight"].T
    mask = causal(len(hidden))
    if sparse:
        mask = picked(weights, hidden, compressed, shape, theta)
    found = []
    for head in range(shape.heads):
        query = queries[:, head * (nope + rope) :][:, : nope + rope]
        query = torch.cat((query[:, :nope], turned(query[:, nope:], theta)), 1)
        own = expanded[:, head * (nope + size) :][:, : nope + size]
        keys = torch.cat((own[:, :nope], shared), 1)
        found.append(attend(query, keys, own[:, nope:], mask, (nope + rope) ** -0.5))
    return torch.cat(found, 1) @ weights["o_proj.weight"].T


def grouped_attention(query: Any, key: Any, value: Any, window: int) -> Any:
    """All tokens of one request: [tokens, heads, size] to [tokens, heads * size]."""
    heads, size = query.shape[1:]
    group = heads // key.shape[1]
    mask = causal(len(query), window)
    found = [
        attend(query[:, head], key[:, head // group], value[:, head // group], mask, size**-0.5)
        for head in range(heads)
    ]
    return torch.cat(found, 1)


def experts(mock: Any, hidden: Any) -> Any:
    """Every token through its experts, one after the other."""
    shape, router, own = mock.geometry.experts, mock.module.router, mock.module.experts
    gate_up, down = own.gate_up_proj.double(), own.down_proj.double()
    found = torch.zeros_like(hidden)
    for token, state in enumerate(hidden):
        logits = (router.weight.double() @ state).tolist()
        if shape.scoring == "sigmoid":
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        else:
            total = sum(math.exp(logit) for logit in logits)
            scores = [math.exp(logit) / total for logit in logits]
        bias = [0.0] * len(scores) if router.bias is None else router.bias.tolist()
        judged = [score + shift for score, shift in zip(scores, bias, strict=True)]
        size = shape.number // shape.groups
        groups = [range(start, start + size) for start in range(0, shape.number, size)]
        best = 2 if router.bias is not None else 1
        worth = [sum(sorted((judged[one] for one in each), reverse=True)[:best]) for each in groups]
        kept = sorted(range(shape.groups), key=lambda group: -worth[group])[: shape.topk_groups]
        allowed = [one for group in kept for one in groups[group]]
        chosen = sorted(allowed, key=lambda one: -judged[one])[: shape.topk]
        norm = sum(scores[one] for one in chosen) if shape.renormalize else 1.0
        for one in chosen:
            gate, up = (gate_up[one] @ state).chunk(2)
            share = shape.scale * scores[one] / norm
            found[token] += share * (down[one] @ (gate / (1 + (-gate).exp()) * up))
    return found
