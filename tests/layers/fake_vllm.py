"""As much of vLLM as its one-layer models import, and a small engine, for hosts without it.

Only names of vLLM 0.24.0; ``test_vllm_signatures.py`` says what the real ones are. Needs torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

WIDTH, VOCAB, LAYERS = 8, 50, 3


class Attention(nn.Module):  # type: ignore[misc, name-defined]
    """Counts its calls; returns a tuple, as many of the engine's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.calls = 0

    def forward(self, positions: Any, hidden_states: Any, scaling: Any = None) -> Any:
        assert scaling is None  # as vLLM's latent attention is called
        self.calls += 1
        return self.inner(hidden_states) * positions[:, None], None


class Layer(nn.Module):  # type: ignore[misc, name-defined]
    """Gives its attention a slice of a fused product, which it then writes over."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.self_attn = Attention()
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, positions: Any, hidden: Any) -> Any:
        fused = self.before(hidden)
        part = fused[:, WIDTH : 2 * WIDTH]
        out, _ = self.self_attn(positions, hidden_states=part)
        fused.zero_()
        return self.mlp(out) + hidden


class Engine(nn.Module):  # type: ignore[misc, name-defined]
    """A causal model as vLLM names its parts; rows do not depend on each other."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        assert prefix == ""
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.model.layers = nn.ModuleList(Layer() for _ in range(vllm_config.layers))
        self.requires_grad_(False)

    def forward(self, input_ids: Any, positions: Any) -> Any:
        hidden = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            hidden = layer(positions, hidden)
        return hidden

    def load_weights(self, weights: Any) -> set[str]:
        given = dict(weights)
        known = dict(self.named_parameters())
        for name, value in given.items():
            known[name].copy_(value)
        return set(given)


def config(layers: int = 1, max_tokens: int = 16) -> SimpleNamespace:
    """What a model is told."""
    return SimpleNamespace(
        layers=layers,
        model_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_tokens),
    )


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the fakes where vLLM's modules would be; opkit's models are imported afresh.

    Returns:
        ``context``: the forward context in force; ``engine``: the class of the engine's model.
    """
    state = SimpleNamespace(context=object(), engine=Engine)
    names: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.24.0"},
        "vllm.config": {"VllmConfig": SimpleNamespace},
        "vllm.forward_context": {
            "ForwardContext": object,
            "get_forward_context": lambda: state.context,
        },
        "vllm.model_executor": {},
        "vllm.model_executor.model_loader": {},
        "vllm.model_executor.model_loader.utils": {"get_model_cls": lambda _: state.engine},
    }
    importlib.import_module("opkit.layers.backends.vllm")  # the package is the real one
    own = "opkit.layers.backends.vllm."
    for name in [name for name in sys.modules if name.startswith((own, "vllm."))]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in names.items():
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return state
