"""Record what opkit uses of vLLM: names, parameters, members, and the digests of their files.

    python tests/layers/record_vllm.py SITE > tests/layers/vllm-0.24.0.json

SITE is a folder that holds the package ``vllm``. Sources are read, nothing of them is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import record_sglang
from record_sglang import parameters

ROOT = Path(__file__).parents[2]
VERSION = "0.24.0"
LAYERS = ROOT / "opkit" / "layers"
FILES = sorted([*LAYERS.glob("backends/vllm/*.py"), *LAYERS.glob("*/vllm.py")])
# What is used of objects that opkit does not import by name: file, class, members.
MEMBERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("v1/worker/worker_base.py", "WorkerWrapperBase"): (
        "init_worker", "init_device", "initialize_from_config", "shutdown", "worker", "__getattr__",
    ),
    ("v1/worker/worker_base.py", "WorkerBase"): ("rank",),
    ("v1/worker/gpu_worker.py", "Worker"): ("get_kv_cache_spec", "model_runner"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner"): (
        "_attn_group_iterator", "_dummy_run", "capture_model", "cudagraph_dispatcher",
        "execute_model", "execute_model_state", "input_batch", "kv_caches", "max_num_tokens",
        "model", "model_config", "query_start_loc", "requests",
    ),
    ("v1/worker/gpu_input_batch.py", "InputBatch"): (
        "num_computed_tokens_cpu", "num_reqs", "req_ids",
    ),
    ("v1/worker/gpu_input_batch.py", "CachedRequestState"): ("prompt_token_ids",),
    ("v1/worker/utils.py", "AttentionGroup"): ("backend", "get_metadata_builder"),
    ("v1/utils.py", "CpuGpuBuffer"): ("np",),
    ("v1/cudagraph_dispatcher.py", "CudagraphDispatcher"): ("cudagraph_mode",),
    ("v1/core/sched/output.py", "SchedulerOutput"): (
        "finished_req_ids", "make_empty", "num_common_prefix_blocks", "num_scheduled_tokens",
        "scheduled_new_reqs", "total_num_scheduled_tokens",
    ),
    ("v1/kv_cache_interface.py", "KVCacheConfig"): ("kv_cache_groups",),
    ("v1/kv_cache_interface.py", "KVCacheGroupSpec"): ("kv_cache_spec", "layer_names"),
    ("v1/kv_cache_interface.py", "KVCacheSpec"): ("block_size", "page_size_bytes"),
    ("compilation/cuda_graph.py", "CUDAGraphWrapper"): ("clear_all_graphs",),
    ("forward_context.py", "ForwardContext"): ("cudagraph_runtime_mode",),
    ("config/compilation.py", "CUDAGraphMode"): (
        "FULL", "FULL_DECODE_ONLY", "NONE", "decode_mode", "has_full_cudagraphs",
        "requires_piecewise_compilation",
    ),
    ("config/compilation.py", "CompilationMode"): ("NONE",),
    ("config/compilation.py", "CompilationConfig"): (
        "cudagraph_capture_sizes", "cudagraph_mode", "max_cudagraph_capture_size", "mode",
        "static_forward_context",
    ),
    ("config/vllm.py", "VllmConfig"): (
        "cache_config", "compilation_config", "device_config", "load_config", "model_config",
        "quant_config", "scheduler_config", "validate_block_size",
    ),
    ("config/cache.py", "CacheConfig"): ("block_size", "num_gpu_blocks_override"),
    ("config/device.py", "DeviceConfig"): ("device",),
    ("config/model.py", "ModelConfig"): (
        "dtype", "enforce_eager", "get_vocab_size", "hf_config", "max_model_len",
    ),
    ("config/scheduler.py", "SchedulerConfig"): ("max_num_batched_tokens", "max_num_seqs"),
    ("engine/arg_utils.py", "EngineArgs"): (
        "compilation_config", "create_engine_config", "data_parallel_size",
        "enable_expert_parallel", "enable_layerwise_nvtx_tracing", "enforce_eager",
        "from_cli_args", "gpu_memory_utilization", "hf_overrides", "load_format",
        "max_model_len", "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size",
        "skip_tokenizer_init", "speculative_config", "tensor_parallel_size",
        "worker_extension_cls",
    ),
    ("usage/usage_lib.py", "UsageContext"): ("OPENAI_API_SERVER",),
    ("model_executor/layers/attention/attention.py", "Attention"): (
        "head_size", "kv_cache", "kv_cache_dtype", "num_heads", "num_kv_heads", "sliding_window",
    ),
    ("model_executor/layers/attention/mla_attention.py", "MLAAttention"): (
        "kv_cache", "kv_cache_dtype",
    ),
    ("model_executor/layers/mla.py", "MultiHeadLatentAttentionWrapper"): ("indexer", "mla_attn"),
    ("model_executor/layers/fused_moe/runner/moe_runner.py", "MoERunner"): (
        "gate", "shared_experts",
    ),
    ("model_executor/models/deepseek_v2.py", "DeepseekV2MLAAttention"): (
        "indexer", "mla_attn", "o_proj",
    ),
    ("model_executor/models/deepseek_v2.py", "Indexer"): ("indexer_op", "k_cache"),
    ("model_executor/models/deepseek_v2.py", "DeepseekV2DecoderLayer"): ("mlp", "self_attn"),
    ("model_executor/models/deepseek_v2.py", "DeepseekV2MoE"): ("experts", "gate"),
    ("model_executor/models/mixtral.py", "MixtralDecoderLayer"): ("block_sparse_moe", "self_attn"),
    ("model_executor/models/mixtral.py", "MixtralMoE"): ("experts", "gate"),
    ("model_executor/models/qwen3_moe.py", "Qwen3MoeSparseMoeBlock"): ("experts", "gate"),
    ("model_executor/models/llama.py", "LlamaAttention"): ("attn", "o_proj", "qkv_proj"),
    ("model_executor/models/llama.py", "LlamaMLP"): ("down_proj", "gate_up_proj"),
    ("envs.py", ""): ("VLLM_SERVER_DEV_MODE", "VLLM_USE_V2_MODEL_RUNNER"),
    ("entrypoints/serve/dev/rpc/api_router.py", ""): ("collective_rpc",),
}  # fmt: skip
# Methods that are called with arguments: file, class, method.
METHODS = (
    ("v1/worker/worker_base.py", "WorkerWrapperBase", "__init__"),
    ("v1/worker/worker_base.py", "WorkerWrapperBase", "init_worker"),
    ("v1/worker/gpu_worker.py", "Worker", "__init__"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "_dummy_run"),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "execute_model"),
    ("compilation/cuda_graph.py", "CUDAGraphWrapper", "__init__"),
    ("engine/arg_utils.py", "EngineArgs", "create_engine_config"),
    ("model_executor/models/deepseek_v2.py", "DeepseekV2MLAAttention", "forward"),
    ("model_executor/layers/fused_moe/runner/moe_runner.py", "MoERunner", "forward"),
    ("model_executor/layers/attention/attention.py", "Attention", "forward"),
    ("model_executor/layers/sparse_attn_indexer.py", "SparseAttnIndexer", "forward_native"),
)


def imports(source: str) -> dict[str, set[str]]:
    """Names imported from vLLM in a source file, by module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            found.setdefault(str(node.module), set()).update(item.name for item in node.names)
    return found


def used() -> dict[str, set[str]]:
    """The same of all of opkit's backend for vLLM."""
    found: dict[str, set[str]] = {}
    for file in FILES:
        for module, names in imports(file.read_text()).items():
            found.setdefault(module, set()).update(names)
    return found


def _file(site: Path, module: str) -> Path:
    base = site / module.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def definition(site: Path, module: str, name: str) -> tuple[Path, Any]:
    """The file and node in which a module's name is defined, through re-exports; None: no node."""
    file = _file(site, module)
    submodule = _file(site, f"{module}.{name}")
    if submodule.exists():
        return submodule, None
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    stars = []
    # Also what is annotated or imported under TYPE_CHECKING, for names that are made when asked.
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in {getattr(target, "id", "") for target in targets}:
                return file, None
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "typing":
            parent = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*parent, node.module or ""]) if node.level else str(node.module)
            names = {item.asname or item.name: item.name for item in node.names}
            if name in names:
                return definition(site, source, names[name])
            if "*" in names:
                stars.append(source)
    for star in stars:
        try:
            return definition(site, star, name)
        except LookupError:
            continue
    raise LookupError(f"{module} has no {name}")


def members(file: Path, owner: str) -> set[str]:
    """Methods and attributes of a class, or the names of a module, coroutines among them."""
    tree = ast.parse(file.read_text())
    waiting = {node.name for node in tree.body if isinstance(node, ast.AsyncFunctionDef)}
    return record_sglang.members(file, owner) | (set() if owner else waiting)


def method(file: Path, owner: str, name: str) -> list[str]:
    """Parameters of a method."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == name:
                    return parameters(item)[1:]
    raise LookupError(f"{owner} has no {name}")


def record(site: Path) -> dict[str, Any]:
    """Everything, as it is written."""
    names: dict[str, dict[str, list[str]]] = {}
    files: set[Path] = set()
    for module, wanted in sorted(used().items()):
        for name in sorted(wanted):
            file, node = definition(site, module, name)
            files.add(file)
            names.setdefault(module, {})[name] = parameters(node)
    known: dict[str, list[str]] = {}
    for (path, owner), wanted_members in MEMBERS.items():
        file = site / "vllm" / path
        files.add(file)
        known[f"{path}:{owner}"] = sorted(members(file, owner) & {*wanted_members})
    methods = {}
    for path, owner, name in METHODS:
        files.add(site / "vllm" / path)
        methods[f"{owner}.{name}"] = method(site / "vllm" / path, owner, name)
    digests = {
        file.relative_to(site).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }
    return {
        "version": VERSION, "names": names, "members": known, "methods": methods, "files": digests,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1])), indent=1))
