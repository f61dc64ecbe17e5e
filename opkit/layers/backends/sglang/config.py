"""The arguments of an SGLang server, cut down to one layer on one rank.

Source: SGLang 0.5.14, ``server_args.py``: the server's own parser reads the server's flags, and its
``ServerArgs`` resolves them, so every default is the server's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from sglang.srt.server_args import ServerArgs
from sglang.srt.server_args_config_parser import ConfigArgumentMerger

from opkit.errors import BadInput
from opkit.layers.backends.shared import loads_checkpoint
from opkit.layers.model_config import local_overrides, read_config
from opkit.layers.op import Case, GemmCase, LaunchMode, MoeCase, Op
from opkit.layers.plan import Plan

# Largest page of any KV pool here: what a request's last page may leave unused.
_PAGE = 128
# From this many tokens on the pool lets as many requests run as a whole server's would.
_LEAST_POOL = 65_536
# SGLang's defaults: on a GPU of 60 to 160 GB (ServerArgs._handle_gpu_memory_settings), and always.
_CHUNK, _PREFILL = 8192, 16384


def server_flags(plan: Plan) -> argparse.Namespace:
    """The server's flags as its own parser reads them, nothing resolved yet.

    Raises:
        BadInput: SGLang refuses the flags, or they ask for what a one-layer mock cannot do.
    """
    read_config(plan.model)  # SGLang would look for a missing folder on a model hub
    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    words = ["--model-path", plan.model, *plan.engine_args]
    try:
        if "--config" in words:
            words = ConfigArgumentMerger(parser).merge_config_with_args(words)
        flags = parser.parse_args(words)
    except SystemExit as error:  # argparse has told the reason on stderr
        raise BadInput("SGLang refuses the server's flags, see its message above") from error
    if flags.speculative_algorithm is not None:
        raise BadInput("a server with speculative decoding cannot be mocked yet")
    for name, flag in (("enable_dp_attention", "--enable-dp-attention"), ("enable_lora", "--lora")):
        if getattr(flags, name):
            raise BadInput(f"a server with {flag} cannot be mocked yet")
    if flags.tp_size not in (1, plan.tp_size):
        raise BadInput(
            f"the plan says tp_size {plan.tp_size}, the server's flags --tp-size {flags.tp_size}"
        )
    return flags


def raise_limits(plan: Plan, flags: argparse.Namespace) -> None:
    """Give ``flags`` room for every case, and a graph for the batch of each.

    What is not too small stays as the server has it.
    """
    cases = [item.case for item in plan.cases]
    length = max(_length(case) for case in cases)
    if flags.context_length is not None:
        flags.context_length = max(flags.context_length, length)
    tokens = -(-max(_tokens(case) for case in cases) // _PAGE) * _PAGE
    chunk = flags.chunked_prefill_size or _CHUNK
    if chunk > 0:
        flags.chunked_prefill_size = max(chunk, tokens)
    flags.max_prefill_tokens = max(flags.max_prefill_tokens or _PREFILL, tokens)
    batch = max(_batch(case) for case in cases)
    if flags.max_running_requests is not None:
        flags.max_running_requests = max(flags.max_running_requests, batch)
    graphs = {
        item.case.batch
        for item in plan.cases
        if item.mode is LaunchMode.GRAPH and isinstance(item.case, Case)
    }
    if graphs:
        flags.cuda_graph_bs_decode = sorted(graphs)


def layer_args(
    plan: Plan, op: Op, flags: argparse.Namespace, overrides: Mapping[str, Any] | None = None
) -> ServerArgs:
    """The server's arguments, with one layer, one rank, and the server's or dummy weights.

    Tensor parallelism is simulated: one rank's share of the op's sizes, and no collectives.

    Args:
        plan: what to run.
        op: whose sizes are shared.
        flags: of :func:`server_flags`; changed.
        overrides: further values for ``config.json``.

    Raises:
        BadInput: SGLang refuses the arguments, or sizes cannot be shared among the ranks.
    """
    if plan.limits == "cases":
        raise_limits(plan, flags)
    stored, origin = read_config(plan.model)
    own = json.loads(flags.json_model_override_args or "{}")
    shape = stored | own
    local = local_overrides(shape, plan.tp_size, op.shares, origin)
    flags.json_model_override_args = json.dumps(
        {**own, **local, "num_hidden_layers": 1, **(overrides or {})}
    )
    cases = [item.case for item in plan.cases]
    need = max(_batch(case) * (_length(case) + _PAGE) for case in cases) + 2 * _PAGE
    changed: dict[str, Any] = {
        "load_format": flags.load_format if loads_checkpoint(plan, flags.load_format) else "dummy",
        "skip_tokenizer_init": True,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "nnodes": 1,
        "node_rank": 0,
        "dist_init_addr": None,
        # A pool that holds the cases: a whole GPU's, for one layer, would be millions of tokens.
        "max_total_tokens": max(need, _LEAST_POOL),
        "enable_layerwise_nvtx_marker": False,  # opkit's ranges are the only ones wanted here
        "forward_hooks": None,
    }
    for name, value in changed.items():
        if not hasattr(flags, name):
            raise BadInput(f"this SGLang has no server argument {name}; written for 0.5.14")
        setattr(flags, name, value)
    try:
        return ServerArgs.from_cli_args(flags)
    except (ValueError, AssertionError) as error:
        raise BadInput(f"SGLang refuses the server's configuration: {error}") from error


def _tokens(case: Any) -> int:
    """New tokens of one step of a case."""
    if isinstance(case, MoeCase):
        return case.tokens
    return case.m if isinstance(case, GemmCase) else case.batch * case.tokens


def _batch(case: Any) -> int:
    """Requests of one step of a case."""
    return case.batch if isinstance(case, Case) else 1


def _length(case: Any) -> int:
    """Tokens of one request of a case, cached ones included."""
    return case.past + case.tokens if isinstance(case, Case) else _tokens(case)
