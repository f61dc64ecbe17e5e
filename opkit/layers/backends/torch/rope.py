"""Rotary position embedding, plain or stretched by YaRN.

Sources: Su et al., "RoFormer", 2021; Peng et al., "YaRN: Efficient Context Window Extension of
Large Language Models", 2023, section 3; how DeepSeek applies it to scale and logits:
DeepSeek-V3's ``modeling_deepseek.py`` and vLLM 0.24.0, ``deepseek_scaling_rope.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from opkit.errors import BadInput

# Where a configuration leaves them out: YaRN's own values for Llama, which DeepSeek kept.
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


class Rope:
    """Rotates pairs of elements by angles that grow with the position.

    Args:
        size: elements that are rotated, even.
        theta: base of the angles' periods.
        length: positions from 0 that are needed.
        scaling: ``rope_scaling`` of a config.json; None or of type ``default``: plain.
        device: where it works.
        dtype: what angles are computed in.

    Raises:
        BadInput: a scaling other than YaRN, or one without its factor or original length.
    """

    def __init__(
        self,
        size: int,
        theta: float,
        length: int,
        scaling: Mapping[str, Any] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        pairs = torch.arange(size // 2, dtype=dtype, device=device)
        frequencies = theta ** (-2 * pairs / size)
        amplitude, self.logit_scale = 1.0, 1.0
        if kind in ("yarn", "deepseek_yarn") and scaling is not None:
            frequencies = _stretched(frequencies, pairs, size, theta, scaling)
            factor = _number(scaling, "factor")
            whole = _magnitude(factor, float(scaling.get("mscale_all_dim", 0)))
            amplitude = _magnitude(factor, float(scaling.get("mscale", 1))) / whole
            self.logit_scale = whole**2
        elif kind not in ("default", None):
            raise BadInput(f"rope_scaling of type {kind!r} is not known; known: yarn, default")
        angles = torch.outer(torch.arange(length, dtype=dtype, device=device), frequencies)
        self.cos, self.sin = angles.cos() * amplitude, angles.sin() * amplitude

    def __call__(self, values: Any, positions: Any, interleaved: bool = True) -> Any:
        """Rotate ``values`` [tokens, heads, size] to their ``positions`` [tokens].

        Args:
            values: what is rotated.
            positions: place of each token in its sequence.
            interleaved: pairs are neighbours (DeepSeek's attention); else an element of the first
                half and its counterpart of the second (DeepSeek's indexer, Llama as stored by
                transformers).
        """
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        wide = values.to(cos.dtype)
        if interleaved:
            one, other = wide[..., 0::2], wide[..., 1::2]
        else:
            one, other = wide.chunk(2, dim=-1)
        turned = (one * cos - other * sin, one * sin + other * cos)
        joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        return joined.to(values.dtype)


def scaling_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of stretching rope; newer files say it in ``rope_parameters``."""
    found = config.get("rope_scaling") or config.get("rope_parameters")
    return found if isinstance(found, Mapping) else None


def _stretched(
    frequencies: Any, pairs: Any, size: int, theta: float, scaling: Mapping[str, Any]
) -> Any:
    """YaRN's "NTK-by-parts": fast pairs stay, slow ones are stretched by the factor."""
    factor = _number(scaling, "factor")
    original = _number(scaling, "original_max_position_embeddings")

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns so often within the original length."""
        return size * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(float(scaling.get("beta_fast", _BETA_FAST)))), 0)
    high = min(math.ceil(pair_turning(float(scaling.get("beta_slow", _BETA_SLOW)))), size - 1)
    slow = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / factor * slow


def _magnitude(factor: float, weight: float) -> float:
    """YaRN's attention temperature as DeepSeek weighs it; 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise BadInput(f"rope_scaling of type yarn needs {key} above 0, not {value!r}")
    return float(value)
