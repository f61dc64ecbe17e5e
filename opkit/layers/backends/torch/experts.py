"""A mixture of experts: router, dispatch, experts, combine.

Sources: Mixtral (Jiang et al., 2024) and Qwen3-MoE for softmax routers; DeepSeek-V2 (2024), section
2.1.2, for groups; DeepSeek-V3 (2024), section 2.1.2, for sigmoid scores with a correction bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear, silu

from opkit.layers.backends.torch.draw import Weights, stream
from opkit.layers.geometry import Experts

# torch's grouped product: public since 2.10, before that under its working name.
GROUPED = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_GROUPED_CAPABILITY = (9, 0)  # Hopper; on older GPUs torch loops, with the counts read on the host
_GROUPED_MULTIPLE = 8  # its rows begin at multiples of 16 bytes: 8 elements of bfloat16
_BIAS_DEVIATION = 0.01  # of a correction bias: small beside scores, whose spread is about 0.2


class Router(torch.nn.Module):  # type: ignore[misc]  # torch is untyped where it is absent
    """Picks each token's experts; in float32 or wider, as the models' own code does."""

    def __init__(self, shape: Experts, hidden: int, weights: Weights) -> None:
        super().__init__()
        self.shape = shape
        self.wide = torch.promote_types(weights.dtype, torch.float32)
        drawn = weights.matrix("gate", shape.number, hidden)
        self.weight = torch.nn.Parameter(drawn.to(self.wide), requires_grad=False)
        self.bias = None
        if shape.bias:
            bias = torch.empty(shape.number, dtype=self.wide, device=weights.device)
            generator = stream(weights.device, weights.seed, "e_score_correction_bias")
            self.bias = torch.nn.Parameter(
                bias.normal_(0, _BIAS_DEVIATION, generator=generator), requires_grad=False
            )

    def forward(self, hidden: Any) -> tuple[Any, Any]:
        """Weights and numbers of the experts of each token, both [tokens, topk]."""
        logits = linear(hidden.to(self.wide), self.weight)
        scores = logits.sigmoid() if self.shape.scoring == "sigmoid" else logits.softmax(dim=-1)
        judged = scores if self.bias is None else scores + self.bias
        if self.shape.groups > 1:
            judged = self._in_best_groups(judged)
        picked = judged.topk(self.shape.topk, dim=-1).indices
        weights = scores.gather(1, picked)
        if self.shape.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.shape.scale, picked

    def _in_best_groups(self, judged: Any) -> Any:
        """Scores with those outside a token's best groups at minus infinity.

        A group is worth its best expert (DeepSeek-V2), or with a bias its two best together (V3).
        """
        grouped = judged.unflatten(1, (self.shape.groups, -1))
        best = min(2 if self.bias is not None else 1, grouped.shape[2])
        worth = grouped.topk(best, dim=-1).values.sum(dim=-1)
        kept = worth.topk(self.shape.topk_groups, dim=-1).indices
        outside = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        return grouped.masked_fill(outside.unsqueeze(2), -torch.inf).flatten(1)


class RoutedExperts(torch.nn.Module):  # type: ignore[misc]
    """Sends tokens to their experts and adds what comes back.

    With torch's grouped product (bfloat16 on Hopper and later, bfloat16 and float32 on a CPU) the
    host never learns how many tokens an expert gets, so the forward can be captured into a CUDA
    graph; else experts run one after another.
    """

    def __init__(self, shape: Experts, hidden: int, weights: Weights) -> None:
        super().__init__()
        size = shape.intermediate_size
        self.topk = shape.topk
        drawn = weights.matrix("experts.gate_up_proj", shape.number, 2 * size, hidden)
        self.gate_up_proj = torch.nn.Parameter(drawn, requires_grad=False)
        drawn = weights.matrix("experts.down_proj", shape.number, hidden, size)
        self.down_proj = torch.nn.Parameter(drawn, requires_grad=False)
        self.grouped = GROUPED is not None and _can_group(
            weights.device, weights.dtype, hidden, size
        )

    def forward(self, hidden: Any, weights: Any, picked: Any) -> Any:
        """The weighted sum of each token's experts, [tokens, hidden].

        Args:
            hidden: [tokens, hidden]. weights, picked: what the router says, [tokens, topk].
        """
        order = picked.flatten().argsort(stable=True)
        rows = hidden[order // self.topk]
        numbers = torch.arange(self.gate_up_proj.shape[0], device=hidden.device)
        ends = torch.searchsorted(picked.flatten()[order], numbers, right=True)
        product = self._grouped_product if self.grouped else self._one_by_one
        gate, up = product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        sorted_rows = product(silu(gate) * up, self.down_proj, ends)
        returned = torch.empty_like(sorted_rows)
        returned[order] = sorted_rows
        by_token = returned.view(hidden.shape[0], self.topk, -1)
        return (weights.unsqueeze(1) @ by_token.to(weights.dtype)).squeeze(1).to(hidden.dtype)

    def _grouped_product(self, rows: Any, matrices: Any, ends: Any) -> Any:
        """Rows of each group by the transpose of its matrix, in one launch."""
        assert GROUPED is not None
        return GROUPED(rows, matrices.transpose(1, 2), offs=ends.to(torch.int32))

    def _one_by_one(self, rows: Any, matrices: Any, ends: Any) -> Any:
        """The same, expert after expert; the host waits for the counts."""
        found = rows.new_empty(rows.shape[0], matrices.shape[1])
        start = 0
        for number, end in enumerate(ends.tolist()):
            if end > start:
                found[start:end] = linear(rows[start:end], matrices[number])
            start = end
        return found


class MixtureOfExperts(torch.nn.Module):  # type: ignore[misc]
    """Router to combine; shared experts are no part of it."""

    def __init__(self, shape: Experts, hidden: int, weights: Weights) -> None:
        super().__init__()
        self.router = Router(shape, hidden, weights)
        self.experts = RoutedExperts(shape, hidden, weights)

    def forward(self, hidden_states: Any) -> Any:
        """[tokens, hidden_size] to the same shape."""
        return self.experts(hidden_states, *self.router(hidden_states))


def _can_group(device: torch.device, dtype: torch.dtype, hidden: int, size: int) -> bool:
    """Whether torch has a grouped product of these matrices."""
    if hidden % _GROUPED_MULTIPLE or size % _GROUPED_MULTIPLE:
        return False
    if device.type == "cpu":
        return dtype in (torch.bfloat16, torch.float32)
    capable = torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY
    return dtype is torch.bfloat16 and capable
