"""Record what opkit uses of SGLang: names, parameters, members, and the digests of their files.

    python tests/layers/record_sglang.py SITE > tests/layers/sglang-0.5.14.json

SITE is a folder that holds the package ``sglang``. Sources are read, nothing of them is imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSION = "0.5.14"
# What is used of objects that opkit does not import by name: file, class, members.
MEMBERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("model_executor/model_runner.py", "ModelRunner"): (
        "alloc_memory_pool", "init_attention_backends", "init_cuda_graphs",
        "init_prefill_cuda_graph", "init_decode_cuda_graph", "forward", "attn_backend", "dtype",
        "device", "eager_runner", "decode_cuda_graph_runner", "prefill_cuda_graph_runner",
        "is_hybrid_swa", "model", "model_config", "page_size", "req_to_token_pool",
        "token_to_kv_pool_allocator",
    ),
    ("model_executor/model_runner.py", ""): ("_build_step_span_name",),
    ("model_executor/model_runner_kv_cache_mixin.py", "ModelRunnerKVCacheMixin"): (
        "max_total_num_tokens", "token_to_kv_pool",
    ),
    ("model_executor/runner/decode_cuda_graph_runner.py", "DecodeCudaGraphRunner"): (
        "attn_backend", "backend", "bs", "num_tokens_per_bs", "_replay_graph_key",
    ),
    ("model_executor/runner_backend/full_cuda_graph_backend.py", "FullCudaGraphBackend"): (
        "replay", "cleanup",
    ),
    ("mem_cache/memory_pool.py", "ReqToTokenPool"): ("req_to_token", "size"),
    ("mem_cache/memory_pool.py", "MLATokenToKVPool"): ("kv_buffer",),
    ("mem_cache/memory_pool.py", "DSATokenToKVPool"): ("index_k_with_scale_buffer",),
    ("mem_cache/memory_pool.py", "MHATokenToKVPool"): ("k_buffer", "v_buffer"),
    ("layers/communicator.py", "LayerCommunicator"): ("qkv_latent_func",),
    ("layers/communicator.py", "AttnTpContext"): ("set_attn_inputs",),
    ("utils/common.py", "BumpAllocator"): ("_pointer",),
    ("models/deepseek_v2.py", "DeepseekV2AttentionMLA"): ("num_local_heads", "o_proj", "indexer"),
    ("models/deepseek_v2.py", "DeepseekV2DecoderLayer"): ("layer_communicator", "self_attn", "mlp"),
    ("layers/radix_attention.py", "RadixAttention"): (
        "tp_q_head_num", "tp_k_head_num", "head_dim", "v_head_dim", "sliding_window_size",
    ),
    ("layers/moe/moe_runner/base.py", "MoeRunnerConfig"): ("inplace",),
    ("layers/moe/fused_moe_triton/layer.py", "FusedMoE"): (
        "moe_runner_config", "num_fused_shared_experts", "runner", "dispatcher",
    ),
    ("eplb/expert_location.py", ""): ("_global_expert_location_metadata",),
    ("model_executor/input_buffers.py", ""): ("_forward_input_buffer_pool",),
    ("model_executor/hook_manager.py", ""): ("register_forward_hooks",),
}  # fmt: skip


def imports(source: str) -> dict[str, set[str]]:
    """Names imported from SGLang in a source file, by module."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            found.setdefault(str(node.module), set()).update(item.name for item in node.names)
    return found


def used() -> dict[str, set[str]]:
    """The same of all of opkit's backend for SGLang."""
    layers = ROOT / "opkit" / "layers"
    files = [*layers.glob("backends/sglang/*.py"), *layers.glob("*/sglang.py")]
    found: dict[str, set[str]] = {}
    for file in files:
        for module, names in imports(file.read_text()).items():
            found.setdefault(module, set()).update(names)
    return found


def definition(site: Path, module: str, name: str) -> tuple[Path, Any]:
    """The file and node in which a module's name is defined, through re-exports."""
    base = site / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if base.is_dir() and (base / f"{name}.py").exists():
        return base / f"{name}.py", None
    stars = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return file, node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in {getattr(target, "id", "") for target in targets}:
                return file, None
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {item.asname or item.name for item in node.names}
            if name in names:
                return definition(site, node.module, name)
            if "*" in names:
                stars.append(node.module)
    for star in stars:
        return definition(site, star, name)
    raise LookupError(f"{module} has no {name}")


def parameters(node: Any) -> list[str]:
    """Parameters of a function, or of a class's initialiser; a dataclass's fields."""
    if isinstance(node, ast.FunctionDef):
        args = node.args
        return [item.arg for item in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    if not isinstance(node, ast.ClassDef):
        return []
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return parameters(item)[1:]
    return [str(getattr(item.target, "id", "")) for item in node.body
            if isinstance(item, ast.AnnAssign)]  # fmt: skip


def members(file: Path, owner: str) -> set[str]:
    """Methods and attributes of a class, or the names of a module."""
    tree: Any = ast.parse(file.read_text())
    if owner:
        tree = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


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
        file = site / "sglang" / "srt" / path
        files.add(file)
        known[f"{path}:{owner}"] = sorted(members(file, owner) & {*wanted_members})
    digests = {
        file.relative_to(site).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }
    return {"version": VERSION, "names": names, "members": known, "files": digests}


if __name__ == "__main__":
    print(json.dumps(record(Path(sys.argv[1])), indent=1))
