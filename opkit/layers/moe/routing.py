"""Driven routing: which experts each token goes to, and activations that make a router pick them.

With random weights near-equal hidden states may fall on few experts, and how many tokens an
expert gets decides how long the kernels take. So tokens are spread by a stated rule, and the
router, the engine's own, is given activations from which it can pick nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from opkit.errors import BadInput
from opkit.layers.geometry import Experts
from opkit.layers.op import MoeCase
from opkit.layers.plan import parse_routing

# An expert's popularity lies between these, in tokens (see _popularity).
_LEAST, _MOST_OF_TOKENS = 1.0, 0.8
_FEW = (0.01, 2.0)  # the same for steps with fewer places than experts
# By how much the chosen experts' logits are raised above the others', in standard deviations of all
# logits: the smallest that does. The first alone outweighs a rounding of logits to bfloat16 some
# ten times; the larger ones are for a router's bias.
_MARGINS = (0.25, 1.0, 4.0, 8.0)
_CHUNK = 2048  # tokens worked on at a time: float64 copies of all would not fit beside a model


def assign(
    tokens: int,
    experts: int,
    topk: int,
    exponent: float,
    seed: int,
    groups: int = 1,
    topk_groups: int = 1,
) -> Any:
    """Choose each token's experts.

    With ``exponent`` 0 tokens are balanced: the numbers of tokens of any two experts differ by at
    most 1 (by at most 2 with groups). Else experts' popularities are drawn from a bounded power
    law, as NVIDIA aiconfigurator's collector does for its MoE tables (commit 095f58a,
    ``collector/helper.py``, ``sample_power_law`` and ``_generate_power_law_distribution``): density
    x^-exponent between 1 and 0.8 * tokens (0.01 and 2 when there are no more places than experts),
    scaled to ``tokens * topk`` places, no expert more often than there are tokens. Unlike there,
    places that rounding and that limit leave over go to the largest remainders, and which tokens
    meet at an expert is random.

    With ``groups`` a token's experts lie in exactly ``topk_groups`` groups of consecutive experts,
    equally many in each, as a group-limited router (DeepSeek-V3) needs it: groups are chosen by
    their experts' popularity first, experts within them then.

    Args:
        tokens: of the step.
        experts: of the layer.
        topk: experts of a token.
        exponent: of the power law; 0: balanced (:func:`opkit.layers.plan.parse_routing`).
        seed: which draw; the same sizes and seed give the same experts.
        groups, topk_groups: expert groups, and those of a token.

    Returns:
        int64 numpy array [tokens, topk]; the experts of a row are distinct, in random order.

    Raises:
        BadInput: sizes that cannot be met.
    """
    if min(tokens, topk, topk_groups) < 1 or topk > experts or topk_groups > groups:
        raise BadInput(f"{tokens} tokens cannot each have {topk} of {experts} experts")
    each, rest = divmod(topk, topk_groups)
    size, left = divmod(experts, groups)
    if rest or left or each > size:
        raise BadInput(
            f"{topk} of {experts} experts cannot lie evenly in {topk_groups} of {groups} groups"
        )
    stream = np.random.default_rng([seed, tokens, experts, topk])
    popularity = _popularity(tokens, experts, topk, exponent, stream).reshape(groups, size)
    found = np.empty((tokens, topk_groups, each), dtype=np.int64)
    of_groups = _counts(popularity.sum(axis=1), tokens * topk_groups, tokens, stream)
    chosen = _lay_out(of_groups, tokens, topk_groups, stream)
    for group in range(groups):
        members, place = np.nonzero(chosen == group)
        if len(members):
            counts = _counts(popularity[group], len(members) * each, len(members), stream)
            within = _lay_out(counts, len(members), each, stream)
            found[members, place] = group * size + within
    return stream.permuted(found.reshape(tokens, topk), axis=1)


def _popularity(tokens: int, experts: int, topk: int, exponent: float, stream: Any) -> Any:
    """Experts' shares of the tokens, not normed: equal, or by inverse of a power law's CDF."""
    if not exponent:
        return np.ones(experts)
    least, most = _FEW
    if tokens * topk > experts:
        least, most = _LEAST, _MOST_OF_TOKENS * tokens
    uniform = stream.random(experts)
    power = 1.0 - exponent
    if not power:
        return least * (most / least) ** uniform
    return ((most**power - least**power) * uniform + least**power) ** (1.0 / power)


def _counts(popularity: Any, total: int, most: int, stream: Any) -> Any:
    """Whole numbers that sum to ``total``, in proportion to ``popularity``, none above ``most``."""
    exact = np.zeros(len(popularity))
    free = np.ones(len(popularity), dtype=bool)
    while True:  # what exceeds the limit is shared among the others, in proportion again
        left = total - most * np.count_nonzero(~free)
        exact[free] = left * popularity[free] / popularity[free].sum() if free.any() else 0.0
        over = free & (exact > most)
        if not over.any():
            break
        exact[over] = most
        free &= ~over
    counts = np.floor(exact).astype(np.int64)
    # Largest remainders first, ties in random order; full ones cannot take another.
    order = np.lexsort((stream.random(len(exact)), -(exact - counts)))
    order = order[counts[order] < most]
    counts[order[: total - counts.sum()]] += 1
    return counts


def _lay_out(counts: Any, rows: int, columns: int, stream: Any) -> Any:
    """A [rows, columns] array in which number i stands ``counts[i]`` times, once a row at most.

    The numbers are laid down the columns one after the other: what stands ``rows`` times at most
    cannot meet itself in a row.
    """
    order = stream.permutation(len(counts))
    flat = np.repeat(order, counts[order])
    return stream.permutation(flat.reshape(columns, rows).T)


def driven_states(
    case: MoeCase, experts: Experts, gate: Any, seed: int, dtype: Any, torch: Any
) -> Any:
    """Hidden states [tokens, hidden] that an engine's own router sends where the case says.

    Args:
        case: tokens, and how they are spread.
        experts: the model's.
        gate: the engine's module of the router's product; its ``e_score_correction_bias`` counts
            where the model has one.
        seed: of the spread and of the noise.
        dtype: element type of the states; what the router picks is checked in it.
        torch: the module.

    Raises:
        BadInput: no states are found for some tokens, see :func:`steer`.
    """
    groups = {"groups": experts.groups, "topk_groups": experts.topk_groups}
    exponent = parse_routing(case.routing)
    choice = assign(case.tokens, experts.number, experts.topk, exponent, seed, **groups)
    return steer(
        gate.weight.detach(),
        choice,
        seed,
        torch,
        scoring=experts.scoring,
        bias=getattr(gate, "e_score_correction_bias", None) if experts.bias else None,
        dtype=dtype,
        **groups,
    )


def steer(
    gate_weight: Any,
    choice: Any,
    seed: int,
    torch: Any,
    *,
    scoring: str = "softmax",
    bias: Any = None,
    groups: int = 1,
    topk_groups: int = 1,
    dtype: Any = None,
) -> Any:
    """Activations from which a router picks just the experts of ``choice``.

    Each token's state is normal noise of deviation 1, as after a norm, plus the least change (by
    the gate's pseudo-inverse) that brings the logits into the wanted order: the logits that the
    noise gives are dealt out again, the largest, raised by a margin, to the chosen experts, the
    others to the rest. So activations stay close to normal, and the experts' weights are as spread
    as those of a random router.

    Args:
        gate_weight: the router's weight [experts, hidden], on any device.
        choice: experts of each token [tokens, topk], as :func:`assign` gives them.
        seed: of the noise.
        torch: the module.
        scoring: ``softmax`` or ``sigmoid`` of the logits.
        bias: added to the scores when picking [experts]; None for none.
        groups, topk_groups: the router keeps that many groups of consecutive experts: with a bias
            those with the largest sum of their two best scores (DeepSeek-V3's noaux_tc), without
            one those with the best expert (DeepSeek-V2).
        dtype: element type of the activations; None: the gate's.

    Returns:
        Hidden states [tokens, hidden] of that element type, on the gate's device. That the
        router picks ``choice`` is checked from these very values, with exact logits and with
        logits rounded to bfloat16, and without a tie.

    Raises:
        BadInput: it cannot be reached; the message tells for how many tokens.
    """
    experts, hidden = gate_weight.shape
    device, dtype = gate_weight.device, dtype or gate_weight.dtype
    wanted = torch.as_tensor(np.asarray(choice), dtype=torch.int64, device=device)
    gate = gate_weight.detach().double()
    router = _Router(gate, scoring, bias, groups, topk_groups, torch)
    inverse = torch.linalg.pinv(gate)
    stream = torch.Generator(device).manual_seed(_stream_of(seed))
    found = torch.empty(len(wanted), hidden, dtype=dtype, device=device)
    missed = 0
    for begin, end in _chunks(len(wanted)):
        noise = torch.randn(end - begin, hidden, generator=stream, device=device)
        left = torch.arange(begin, end, device=device)
        plain = noise.double()
        for margin in _MARGINS:
            found[left] = _dealt(
                plain[left - begin], wanted[left], gate, inverse, margin, torch
            ).to(dtype)
            left = left[~router.picks(found[left], wanted[left])]
            if not len(left):
                break
        missed += len(left)
    if missed:
        raise BadInput(
            f"the router cannot be steered: {missed:,} of {len(wanted):,} tokens would go to "
            f"other experts ({experts} experts, {hidden} elements)",
            "its weights may depend on each other, or its bias outweigh every score",
        )
    return found


def _stream_of(seed: int) -> int:
    """A seed of its own: with that of the gate's weights, the noise would be those weights."""
    return int.from_bytes(
        hashlib.sha256(f"opkit routing noise {seed}".encode()).digest()[:6], "big"
    )


def _chunks(tokens: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, tokens, _CHUNK):
        yield begin, min(begin + _CHUNK, tokens)


def _dealt(noise: Any, wanted: Any, gate: Any, inverse: Any, margin: float, torch: Any) -> Any:
    """The noise [tokens, hidden], moved so that its logits are in the wanted order."""
    logits = noise @ gate.T
    topk = wanted.shape[1]
    ranked = logits.sort(dim=1, descending=True).values
    ranked[:, :topk] += margin * logits.std()
    if margin > _MARGINS[0]:  # scores of a sigmoid cannot rise for ever
        ranked[:, topk:] -= margin * logits.std()
    # Places of the others in the order of their own logits: the least change.
    masked = logits.scatter(1, wanted, math.inf)
    others = masked.argsort(dim=1, descending=True)[:, topk:]
    best_first = wanted.gather(1, logits.gather(1, wanted).argsort(dim=1, descending=True))
    target = torch.empty_like(logits).scatter_(1, torch.cat((best_first, others), 1), ranked)
    return noise + (target - logits) @ inverse.T


class _Router:
    """Tells whether a router picks the wanted experts, with no tie and no group in doubt."""

    def __init__(
        self, gate: Any, scoring: str, bias: Any, groups: int, topk_groups: int, torch: Any
    ) -> None:
        if scoring not in ("softmax", "sigmoid"):
            raise BadInput(f"unknown scoring {scoring!r} of a router; known: softmax, sigmoid")
        self._gate, self._torch = gate, torch
        self._score = torch.sigmoid if scoring == "sigmoid" else lambda x: torch.softmax(x, dim=-1)
        self._bias = None if bias is None else bias.detach().to(gate)
        self._groups, self._topk_groups = groups, topk_groups

    def picks(self, hidden: Any, wanted: Any) -> Any:
        """For each row of ``hidden`` whether its experts are those of ``wanted``; bool [tokens]."""
        logits = hidden.double() @ self._gate.T
        rounded = logits.to(self._torch.bfloat16).double()
        return self._wins(logits, wanted) & self._wins(rounded, wanted)

    def _wins(self, logits: Any, wanted: Any) -> Any:
        torch = self._torch
        scores = self._score(logits)
        if self._bias is not None:
            scores = scores + self._bias
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, wanted, True)
        if self._groups == 1:
            return _above(scores, chosen)
        grouped = scores.unflatten(1, (self._groups, -1))
        kept = chosen.unflatten(1, (self._groups, -1)).any(dim=2)
        of_group = 1 if self._bias is None else min(2, grouped.shape[2])
        best = grouped.topk(of_group, dim=2).values.sum(dim=2)
        out = ~kept.repeat_interleave(grouped.shape[2], dim=1)
        within = _above(scores.masked_fill(out, -math.inf), chosen)
        return (kept.sum(dim=1) == self._topk_groups) & _above(best, kept) & within


def _above(scores: Any, chosen: Any) -> Any:
    """Whether each row's least chosen score is above its largest other; bool [rows]."""
    least = scores.masked_fill(~chosen, math.inf).amin(dim=1)
    return least > scores.masked_fill(chosen, -math.inf).amax(dim=1)
