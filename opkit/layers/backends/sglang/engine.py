"""Start and end of SGLang's model runner around a model of one layer.

Source: SGLang 0.5.14, ``bench_one_batch.py`` and ``managers/scheduler.py`` for the order of
start-up.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
)
from sglang.srt.entrypoints.engine import _set_envs_and_config
from sglang.srt.eplb import expert_location
from sglang.srt.layers.moe import initialize_moe_config
from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
from sglang.srt.model_executor import input_buffers
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.utils.network import get_free_port

from opkit.errors import BadInput
from opkit.layers import progress
from opkit.layers.backends.sglang.models import one_layer

# Warming up for the first graph is a model's first step, in which SGLang has every kernel of
# ``sglang.jit_kernel`` (tvm-ffi: ninja, one nvcc after the other) and of DeepGEMM compiled that the
# host's caches do not hold; Triton and Inductor likewise. On an H100 host, measured: gqa 36 s, then
# 1 s for the second graph; DSA's server 138 s, the mock after it 3 s.
COMPILING = (
    "capturing decode graphs; where this host has not run such a layer yet, SGLang compiles its "
    "kernels first (1 to 3 min, once)"
)


class LayerRunner(ModelRunner):  # type: ignore[misc]  # SGLang is untyped where it is absent
    """The engine's model runner, without its compiled prefill graphs."""

    def init_prefill_cuda_graph(self, force_for_draft_worker: bool = False) -> None:
        """Prefill runs eagerly, as the engine's does where no graph is large enough."""
        del force_for_draft_worker
        self.prefill_cuda_graph_runner = self.eager_runner


def environment() -> None:
    """What the engine's launcher sets for its processes before they use CUDA.

    Source: ``entrypoints/engine.py``, ``_set_envs_and_config``, which sets the same again.
    """
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    os.environ["CUDA_MODULE_LOADING"] = "AUTO"


def start(args: ServerArgs, paths: Sequence[str], layer: int, graphs: bool) -> LayerRunner:
    """The engine's start-up, in the order of its scheduler process.

    Args:
        args: of a server of one layer on one rank.
        paths: the op's modules below a decoder layer.
        layer: whose weights a checkpoint gives.
        graphs: whether decode graphs are captured.

    Raises:
        BadInput: the engine has no such model or module, or its flags allow no graphs.
    """
    _set_envs_and_config(args)
    set_global_server_args_for_scheduler(args)
    initialize_moe_config(args)
    initialize_fp8_gemm_config(args)
    initialize_fp4_gemm_config(args)
    config = ModelConfig.from_server_args(args)
    with _instead(config.hf_config.architectures, paths, layer), torch.no_grad():
        runner = LayerRunner(
            model_config=config,
            mem_fraction_static=args.mem_fraction_static,
            gpu_id=args.base_gpu_id,
            tp_rank=0,
            tp_size=1,
            moe_ep_rank=0,
            moe_ep_size=1,
            pp_rank=0,
            pp_size=1,
            nccl_port=args.nccl_port or get_free_port(),
            server_args=args,
        )
        runner.alloc_memory_pool()
        runner.init_attention_backends()
        if graphs:
            progress.say(COMPILING)
        runner.init_cuda_graphs(capture_decode_cuda_graph=graphs)
    if runner.decode_cuda_graph_runner is None:
        raise BadInput("the plan asks for mode graph, the server's flags allow no graphs")
    return runner


def end() -> None:
    """What the engine keeps for its process, given back: a server builds one runner, opkit more."""
    destroy_model_parallel()
    destroy_distributed_environment()
    expert_location._global_expert_location_metadata = None
    input_buffers._forward_input_buffer_pool.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _instead(architectures: Sequence[str], paths: Sequence[str], layer: int) -> Iterator[None]:
    """Have the engine's loader build :class:`OneLayer` around the class that it would build."""
    name = next((name for name in architectures if name in ModelRegistry.models), None)
    if name is None:
        raise BadInput(f"SGLang has no model {', '.join(architectures)}")
    engine: type[Any] = ModelRegistry.models[name]
    ModelRegistry.models[name] = one_layer(engine, paths, layer)
    try:
        yield
    finally:
        ModelRegistry.models[name] = engine
