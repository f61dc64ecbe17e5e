"""As much of SGLang as its backend imports, for tests on hosts without it.

Only names and shapes of SGLang 0.5.14; ``test_sglang_signatures.py`` says what the real ones are.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Refused(ValueError):
    """What SGLang says of arguments that it does not take."""


@dataclass
class ServerArgs:
    """A few of the server's arguments, parsed as SGLang parses them."""

    model_path: str = ""
    device: Any = None
    load_format: str = "auto"
    json_model_override_args: str = "{}"
    skip_tokenizer_init: bool = False
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    ep_size: int = 1
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: Any = None
    context_length: Any = None
    chunked_prefill_size: Any = None
    max_prefill_tokens: Any = None
    max_running_requests: Any = None
    max_total_tokens: Any = None
    cuda_graph_bs_decode: Any = None
    speculative_algorithm: Any = None
    enable_dp_attention: bool = False
    enable_lora: Any = None
    enable_layerwise_nvtx_marker: bool = False
    forward_hooks: Any = None
    base_gpu_id: int = 0
    refuse_me: bool = False

    def __post_init__(self) -> None:
        if self.refuse_me:
            raise Refused("not with me")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        for item in fields(ServerArgs):
            flag = "--" + item.name.replace("_", "-")
            if item.type == "bool":
                parser.add_argument(flag, action="store_true")
            else:
                whole = item.type == "int" or item.name.startswith(("max_", "chunked", "context"))
                parser.add_argument(flag, type=int if whole else str, default=item.default)

    @classmethod
    def from_cli_args(cls, flags: argparse.Namespace) -> ServerArgs:
        return cls(**{item.name: getattr(flags, item.name) for item in fields(cls)})


class BumpAllocator:
    """Hands out parts of a buffer, one after the other."""

    def __init__(self) -> None:
        self._pointer = 0


@dataclass
class Output:
    """The engine's ``LogitsProcessorOutput``."""

    next_token_logits: Any
    hidden_states: Any = None


class AttentionInputs:
    """What a layer leaves aside for its attention."""

    def __init__(self, hidden_states: Any, forward_batch: Any, qkv_latent_func: Any) -> None:
        self.hidden_states, self.forward_batch = hidden_states, forward_batch
        self.qkv_latent_func = qkv_latent_func


@dataclass
class Left:
    """The engine's one place for :class:`AttentionInputs`."""

    inputs: list[AttentionInputs] = field(default_factory=list)

    def set_attn_inputs(self, inputs: AttentionInputs) -> None:
        self.inputs.append(inputs)


@contextmanager
def forward_context(context: Any) -> Any:
    yield context


def described(batch: Any, runner: Any) -> Any:
    """The engine's ``ForwardBatch`` of a ``ScheduleBatch``."""
    return SimpleNamespace(**vars(batch), runner=runner)


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the fakes where SGLang's modules would be; opkit's backend is imported afresh.

    Returns:
        ``capture`` (whether the engine captures graphs) and ``left`` (what layers left aside).
    """
    state = SimpleNamespace(capture=False, left=Left())
    srt = "sglang.srt."
    names: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.5.14"},
        srt + "server_args": {"ServerArgs": ServerArgs},
        srt + "server_args_config_parser": {"ConfigArgumentMerger": None},
        srt + "layers.communicator": {
            "AttentionInputs": AttentionInputs,
            "get_attn_tp_context": lambda: state.left,
        },
        srt + "layers.logits_processor": {"LogitsProcessorOutput": Output},
        srt + "model_executor.runner": {"get_is_capture_mode": lambda: state.capture},
        srt + "model_executor.forward_context": {
            "ForwardContext": SimpleNamespace,
            "forward_context": forward_context,
        },
        srt + "model_executor.forward_batch_info": {
            "ForwardBatch": SimpleNamespace(init_new=described),
            "ForwardMode": SimpleNamespace(EXTEND="extend", DECODE="decode"),
        },
        srt + "managers.schedule_batch": {"ScheduleBatch": SimpleNamespace},
        srt + "speculative.spec_info": {"SpeculativeAlgorithm": SimpleNamespace(NONE="none")},
        srt + "utils": {"BumpAllocator": BumpAllocator},
        "opkit.layers.backends.sglang.engine": {"environment": lambda: None},
    }
    importlib.import_module("opkit.layers.backends.sglang")  # the package is the real one
    own = "opkit.layers.backends.sglang."
    for name in [name for name in sys.modules if name.startswith(own)]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in names.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if parent not in sys.modules and parent not in names:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        module = ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return state
