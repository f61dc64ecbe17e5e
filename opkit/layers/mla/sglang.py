"""The MLA mock of SGLang: ``DeepseekV2AttentionMLA`` without an indexer, in SGLang's own runner.

Source: SGLang 0.5.14, ``models/deepseek_v2.py``. On an H100 its attention backend is fa3: dense
heads in prefill without a cached prefix, absorbed into the latent in generation.
"""

from __future__ import annotations

from opkit.errors import BadInput
from opkit.layers.backends.sglang.mock import Build, SglangMock
from opkit.layers.dsa.sglang import LATENT_FUNCTIONS, latent
from opkit.layers.geometry import read_geometry
from opkit.layers.mla import MLA
from opkit.layers.plan import Plan


def build(plan: Plan) -> SglangMock:
    """The mock that ``plan`` asks for.

    Raises:
        BadInput: the model has no latent attention, or one with an indexer.
    """
    geometry = read_geometry(plan.model)
    if geometry.latent is None:
        raise BadInput(f"{plan.model}: a model without latent attention has no mla")
    if geometry.indexer is not None:
        raise BadInput(f"{plan.model}: latent attention with an indexer is the op dsa")
    build_ = Build(("self_attn",), latent, ("kv_cache",), functions=LATENT_FUNCTIONS)
    return SglangMock(plan, MLA, build_)
