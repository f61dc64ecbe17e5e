"""How activations, caches and limits came to their values, as a manifest tells it.

For the mocks that drive an engine's own worker; others have recipes of their own.
"""

from __future__ import annotations

from pathlib import Path

from opkit.layers.plan import Plan

_CACHES = {
    "prefilled": "the same prompts prefilled through the engine's layer, one request a step, at "
    "most {limit:,} tokens a step",
    "pooled": "one long prompt prefilled through the engine's layer, its blocks repeated over the "
    "cache",
}
_LIMITS = {
    "server": "the server's own",
    "cases": "lengths, requests and tokens a step raised to what the cases need; a graph for each "
    "batch",
}
_INPUTS = {
    "tokens": "prompt_tokens(seed={seed}, request 0 to batch-1), through the engine's own modules "
    "before the op, of layer {layer}",
    "captured": "captured from the engine's layer {layer}: {captured}",
    "normal": "normal(0, 1) in every floating-point argument",
    "zeros": "zeros in every floating-point argument: degenerate on purpose",
    "rows": "the first row of each argument in all its rows: degenerate on purpose",
}


def recipe_of(plan: Plan, weights: str, layer: int, limit: int, *, cached: bool) -> dict[str, str]:
    """The recipe of a mock.

    Args:
        plan: what it was built for.
        weights: how they were drawn; empty: they are the server's checkpoint.
        layer: the engine's layer that it stands for.
        limit: tokens of a prefill step that fills the cache, at most.
        cached: whether the op has a cache.
    """
    answered = "; decode steps: the tokens that the engine answered" if plan.answers else ""
    found = {
        "weights": weights or f"the server's checkpoint, layer {layer}",
        "activations": _INPUTS[plan.inputs].format(
            seed=plan.seed, layer=layer, captured=Path(plan.captured).name
        )
        + (answered if plan.inputs == "tokens" else ""),
        "limits": _LIMITS[plan.limits],
    }
    if cached:
        found["kv_cache"] = _CACHES[plan.caches].format(limit=limit)
        found["kv_cache_blocks"] = "consecutive blocks of a fresh pool, request after request"
    return found
