"""The configuration of ``trtllm-serve``, cut down to one layer on one rank.

Source: NVIDIA/TensorRT-LLM, ``tensorrt_llm/commands/serve.py`` at 00209af (flags; a YAML file
overrides them) and ``tensorrt_llm/_torch/pyexecutor/model_loader.py`` at 1f41a4c (dummy weights).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from opkit.errors import BadInput
from opkit.layers.model_config import local_overrides, read_config
from opkit.layers.op import AnyCase, Case, MoeCase, Op
from opkit.layers.plan import Plan

# Flags that say how large a step may be, or what is in it; all else is about the server, the
# scheduler or the tokenizer.
_SIZES = ("max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width")
_ALIASES = {
    "tp_size": "tensor_parallel_size",
    "pp_size": "pipeline_parallel_size",
    "cp_size": "context_parallel_size",
    "ep_size": "moe_expert_parallel_size",
    "config": "extra_llm_api_options",
}
_SWITCHES = ("enable_chunked_prefill", "trust_remote_code")
# More than one of these ranks cannot be simulated by local heads.
_REFUSED = ("pipeline_parallel_size", "context_parallel_size", "moe_expert_parallel_size")
_PARALLEL = (*_REFUSED, "tensor_parallel_size", "moe_tensor_parallel_size", "gpus_per_node")
# What trtllm-serve takes where neither flag nor file says anything (``BuildConfig``).
_DEFAULTS = {"max_batch_size": 2048, "max_num_tokens": 8192}
# Tokens of a request in a step of experts with driven routing, whose attention is not measured.
_MOE_REQUEST = 2048
# What a model's folder holds beside config.json that its construction may read.
_BESIDE = ("hf_quant_config.json", "quant_cfg.json", "*.py")


@dataclass(frozen=True)
class Server:
    """What the serving command says that a layer depends on.

    Attributes:
        options: fields of ``TorchLlmArgs``, without the parallel ones.
        ignored: flags that a layer does not depend on, as far as opkit knows.
    """

    options: dict[str, Any]
    ignored: tuple[str, ...] = field(default=())


def read_server(plan: Plan) -> Server:
    """Read the server's flags, and the YAML file that they name, which overrides them.

    Raises:
        BadInput: the file cannot be read, or they ask for what one rank cannot show.
    """
    flags, ignored = _flags(plan.engine_args)
    options: dict[str, Any] = {name: int(flags[name]) for name in _SIZES if name in flags}
    options |= {name: True for name in _SWITCHES if name in flags}
    parallel = {name: int(flags[name]) for name in _PARALLEL if name in flags}
    for name, value in _yaml(flags.get("extra_llm_api_options")).items():
        (parallel if name in _PARALLEL else options)[name] = value
    for name in _REFUSED:
        if (parallel.get(name) or 1) > 1:
            raise BadInput(f"a server with {name} {parallel[name]} cannot be mocked on one rank")
    ranks = parallel.get("tensor_parallel_size") or 1
    if ranks not in (1, plan.tp_size):
        raise BadInput(
            f"the plan says tp_size {plan.tp_size}, the server's flags tensor_parallel_size {ranks}"
        )
    if options.pop("enable_attention_dp", False):
        raise BadInput("a server with attention data parallelism cannot be mocked yet")
    if options.pop("speculative_config", None):
        raise BadInput("a server with speculative decoding cannot be mocked yet")
    if flags.get("backend", "pytorch") != "pytorch":
        raise BadInput(f"only the pytorch backend can be mocked, not {flags['backend']}")
    sizes = _DEFAULTS | {name: value for name, value in options.items() if value is not None}
    if plan.limits == "cases":
        sizes |= {name: max(sizes.get(name) or 0, need) for name, need in needs(plan).items()}
    return Server(sizes, ignored)


@dataclass(frozen=True)
class Request:
    """Part of a step: ``tokens`` new ones of request ``number`` after ``past`` cached ones."""

    number: int
    past: int
    tokens: int

    @property
    def length(self) -> int:
        """Its tokens after the step."""
        return self.past + self.tokens


def requests_of(case: AnyCase) -> tuple[Request, ...]:
    """The requests of the step that a case is run in; none for a single product."""
    if isinstance(case, Case):
        return tuple(Request(number, case.past, case.tokens) for number in range(case.batch))
    if isinstance(case, MoeCase):
        starts = range(0, case.tokens, _MOE_REQUEST)
        return tuple(
            Request(number, 0, min(_MOE_REQUEST, case.tokens - start))
            for number, start in enumerate(starts)
        )
    return ()


def needs(plan: Plan) -> dict[str, int]:
    """Requests, tokens a step and tokens a request that the plan's cases need."""
    steps = [requests_of(item.case) for item in plan.cases]
    return {
        "max_batch_size": max(map(len, steps), default=0),
        "max_num_tokens": max((sum(part.tokens for part in step) for step in steps), default=0),
        "max_seq_len": max((part.length for step in steps for part in step), default=0),
    }


def one_layer_folder(plan: Plan, op: Op, overrides: Mapping[str, Any]) -> Path:
    """A folder with the model's configuration, of one layer and one rank's sizes.

    TensorRT-LLM's own loader makes the model from it, as from a model's folder. Tensor parallelism
    is simulated by local sizes.

    Args:
        plan: names the model and the ranks.
        op: says which sizes a rank has its share of.
        overrides: further values; those whose keys the configuration lacks are left out.

    Returns:
        A new temporary folder, which the caller removes.

    Raises:
        BadInput: no readable configuration, or sizes that cannot be shared.
    """
    config, origin = read_config(plan.model)
    local = local_overrides(config, plan.tp_size, op.shares, origin)
    known = {name: value for name, value in overrides.items() if name in config}
    folder = Path(tempfile.mkdtemp(prefix="opkit-trtllm-"))
    text = json.dumps(config | known | local | {"num_hidden_layers": 1}, indent=1)
    (folder / "config.json").write_text(text + "\n")
    for pattern in _BESIDE:
        for path in Path(origin).parent.glob(pattern):
            shutil.copy(path, folder)
    return folder


def _flags(arguments: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The flags a layer depends on, by their long names with underscores; and the others."""
    found: dict[str, str] = {}
    ignored: list[str] = []
    wanted = {*_SIZES, *_PARALLEL, "extra_llm_api_options", "backend"}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        name = _ALIASES.get(name, name)
        if word.startswith("--") and name in _SWITCHES:
            found[name] = value or "true"
        elif word.startswith("--") and name in wanted:
            if not equals and not rest:
                raise BadInput(f"the server's flag {word} has no value")
            found[name] = value if equals else rest.pop(0)
            if name not in ("extra_llm_api_options", "backend") and not found[name].isdigit():
                raise BadInput(f"the server's flag {word} needs a number, not {found[name]!r}")
        else:
            ignored.append(word)
    return found, tuple(ignored)


def _yaml(path: str | None) -> dict[str, Any]:
    """The content of the YAML file of options; nothing without one."""
    if path is None:
        return {}
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: no readable file of options ({error})") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a YAML mapping of options")
    return data
