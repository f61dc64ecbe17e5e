"""The configuration of a vLLM server, cut down to one layer on one rank.

Source: vLLM 0.24.0, ``entrypoints/openai/cli_args.py`` and ``engine/arg_utils.py``: the server's
parser reads the server's flags, so every default is the server's.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.cli_args import make_arg_parser
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from opkit.errors import BadInput
from opkit.layers.backends.shared import loads_checkpoint
from opkit.layers.geometry import local_overrides
from opkit.layers.op import Case, LaunchMode, MoeCase
from opkit.layers.plan import Plan


def model_json(model: str) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        BadInput: ``model`` is not a folder with a readable one.
    """
    path = Path(model) / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: no readable model configuration ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: not a JSON object")
    return data


def server_args(plan: Plan) -> AsyncEngineArgs:
    """The server's flags, read by vLLM's own parser.

    Raises:
        BadInput: vLLM refuses the flags, or they ask for what a one-layer mock cannot do.
    """
    model_json(plan.model)  # vLLM would look for a missing folder on a model hub
    try:
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(
            [plan.model, *plan.engine_args]
        )
    except SystemExit as error:  # argparse has told the reason on stderr
        raise BadInput("vLLM refuses the server's flags, see its message above") from error
    parsed.model = parsed.model_tag
    args = AsyncEngineArgs.from_cli_args(parsed)
    if args.speculative_config is not None:
        raise BadInput("a server with speculative decoding cannot be mocked yet")
    if args.tensor_parallel_size not in (1, plan.tp_size):
        raise BadInput(
            f"the plan says tp_size {plan.tp_size}, the server's flags "
            f"--tensor-parallel-size {args.tensor_parallel_size}"
        )
    return args


def raise_limits(plan: Plan, args: AsyncEngineArgs) -> AsyncEngineArgs:
    """The server's flags with room for every case, and a graph for the batch of each.

    What is not too small stays as the server has it.
    """
    cases = [item.case for item in plan.cases if isinstance(item.case, Case)]
    flat = [item.case.tokens for item in plan.cases if isinstance(item.case, MoeCase)]
    needs = {
        "max_model_len": max((case.past + case.tokens for case in cases), default=1),
        "max_num_seqs": max((case.batch for case in cases), default=1),
        "max_num_batched_tokens": max([case.batch * case.tokens for case in cases] + flat + [1]),
    }
    # A limit that the flags leave to vLLM is left to it, unless its default is known to be small.
    defaults = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    raised = {
        name: max(need, getattr(args, name) or 0)
        for name, need in needs.items()
        if getattr(args, name) is not None or need > defaults.get(name, need)
    }
    if args.max_num_batched_tokens is not None:  # vLLM wants a token for each request, at least
        raised["max_num_batched_tokens"] = max(
            raised["max_num_batched_tokens"], raised.get("max_num_seqs", 1)
        )
    compilation = copy.deepcopy(args.compilation_config)
    graphs = [item.case for item in plan.cases if item.mode is LaunchMode.GRAPH]
    batches = {case.batch for case in graphs if isinstance(case, Case)}
    if batches:
        compilation.cudagraph_capture_sizes = sorted(batches)
        compilation.max_cudagraph_capture_size = None
    return dataclasses.replace(args, **raised, compilation_config=compilation)


def layer_config(
    plan: Plan, args: AsyncEngineArgs, shares: Sequence[str], extra: Mapping[str, Any]
) -> VllmConfig:
    """The server's configuration, with one layer and one rank.

    Tensor parallelism is simulated: one rank's share of heads and sizes, and no collectives.
    Weights are vLLM's dummy ones, unless the server loads a checkpoint and there is one rank.

    Args:
        plan: what is to be run.
        args: the server's flags.
        shares: keys of ``config.json`` of which a rank has its share.
        extra: further values for ``config.json``.

    Raises:
        BadInput: vLLM refuses the configuration, or something cannot be shared among the ranks.
    """
    if plan.limits == "cases":
        args = raise_limits(plan, args)
    overrides = dict(args.hf_overrides) if isinstance(args.hf_overrides, dict) else {}
    shape = model_json(plan.model) | overrides
    overrides |= {"num_hidden_layers": 1, **extra}
    overrides |= local_overrides(shape, plan.tp_size, shares, plan.model)
    one_rank = dataclasses.replace(
        args,
        compilation_config=_uncompiled(args.compilation_config),
        hf_overrides=overrides,
        load_format=args.load_format if loads_checkpoint(plan, args.load_format) else "dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        enable_expert_parallel=False,
        enable_layerwise_nvtx_tracing=False,  # opkit's ranges are the only ones wanted here
        gpu_memory_utilization=0.3,  # only checked against free memory at start; one layer is small
    )
    try:
        # The server's context: defaults such as max_num_batched_tokens depend on it.
        return one_rank.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except ValueError as error:
        raise BadInput(f"vLLM refuses the server's configuration: {error}") from error


def _uncompiled(given: CompilationConfig) -> CompilationConfig:
    """The same without compiling the model: a mock launches modules, no compiled pieces.

    Decode steps that a compiled server replays whole stay whole; piecewise graphs exist only in
    compiled models.
    """
    made = copy.deepcopy(given)
    made.mode = CompilationMode.NONE
    graphs = made.cudagraph_mode
    if graphs is None or graphs.requires_piecewise_compilation():
        whole = graphs is None or graphs.decode_mode() == CUDAGraphMode.FULL
        made.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY if whole else CUDAGraphMode.NONE
    return made
