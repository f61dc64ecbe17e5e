"""A small export with the real schema of nsys 2024.2.3, written row by row.

Two processes whose correlation ids clash; three eager steps and a graph step of a 2-layer model.
Planted where nsys puts such things: a host, a user, paths, an environment, a bus location.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

SCHEMA = (Path(__file__).parent / "schema_3_11_1.sql").read_text()
PID = 0x1_0000_1000000
OTHER_PID = 0x1_0000_2000000
TID = PID + 77
HOST, USER = "gpu-node-17", "alice.k"
EAGER_STEP = "execute_context_1(4096)_generation_0(0)"
GRAPH_STEP = "execute_context_0(0)_generation_4(4)"
GEMM = "void cutlass::gemm<(int)128, float>(T1::Params, [lambda(int) (instance 1)])"
TOPK = "void vllm::topKPerRow<(bool)1, lambda(int)#1>(const float *, int)"
COPY = "void at::native::copy_kernel at /build/alice.k/pytorch/Copy.cu:33"
CALL, GRAPH_CALL, UNUSED = "cudaLaunchKernel_v7000", "cudaGraphLaunch_v10000", "pthread_cond_wait"
STRINGS = (GEMM, TOPK, COPY, CALL, GRAPH_CALL, UNUSED, "registered range in /srv/data/run 4")


def put(db: sqlite3.Connection, table: str, **cells: Any) -> None:
    """Insert a row; columns that must not be null and are not given become 0."""
    needed = [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[3]]
    cells = dict.fromkeys(needed, 0) | cells
    names = ", ".join(f'"{name}"' for name in cells)
    marks = ", ".join("?" * len(cells))
    db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(cells.values()))


def module_range(layer: int, name: str, outputs: bool = False) -> str:
    """A layerwise marker as vLLM writes it."""
    more = "'Outputs': [[4096, 7168]]" if outputs else "'Inputs': [[4096, 7168]]"
    return f"{{'Module': 'model.layers.{layer}.{name}', 'TrainableParams': {{}}, {more}}}"


def make_export(path: Path) -> Path:
    """Write the export to ``path``."""
    db = sqlite3.connect(path)
    db.executescript(SCHEMA)
    for number, text in enumerate(STRINGS, 1):
        put(db, "StringIds", id=number, value=text)
    for step in range(3):
        _eager_step(db, 1_000_000 * (step + 1), step)
    _graph_step(db, 5_000_000)
    _machine(db)
    db.commit()
    db.close()
    return path


def _range(db: sqlite3.Connection, start: int, end: int, text: str) -> None:
    put(db, "NVTX_EVENTS", start=start, end=end, eventType=59, text=text, globalTid=TID)


def _kernel(
    db: sqlite3.Connection, start: int, correlation: int, name: int, pid: int = PID, **more: Any
) -> None:
    put(
        db,
        "CUPTI_ACTIVITY_KIND_KERNEL",
        start=start,
        end=start + 900,
        streamId=7,
        correlationId=correlation,
        globalPid=pid,
        demangledName=name,
        shortName=name,
        gridX=8,
        gridY=1,
        gridZ=1,
        **more,
    )


def _call(db: sqlite3.Connection, start: int, correlation: int, tid: int, name: int = 4) -> None:
    put(
        db,
        "CUPTI_ACTIVITY_KIND_RUNTIME",
        start=start,
        end=start + 50,
        globalTid=tid,
        correlationId=correlation,
        nameId=name,
        callchainId=5,
    )


def _eager_step(db: sqlite3.Connection, start: int, step: int) -> None:
    """Two layers of attention (GEMM, top-k) and MLP (copy); the GPU runs 500,000 ns behind."""
    _range(db, start, start + 400_000, EAGER_STEP)
    for layer in range(2):
        at = start + 100_000 * layer
        for offset, module, name in ((0, "self_attn", 1), (500, "self_attn", 2), (9_000, "mlp", 3)):
            correlation = 100 * step + 10 * layer + name
            _call(db, at + offset + 10, correlation, TID)
            _kernel(db, at + offset + 500_000, correlation, name)
            if offset != 500:
                _range(db, at + offset, at + offset + 800, module_range(layer, module))
                _range(db, at + offset + 790, at + offset + 800, module_range(layer, module, True))
        # The same correlation id in another process, which labels no steps.
        _call(db, at + 20, 100 * step + 10 * layer + 1, OTHER_PID + 3)
        _kernel(db, at + 500_000, 100 * step + 10 * layer + 1, 1, OTHER_PID)


def _graph_step(db: sqlite3.Connection, start: int) -> None:
    """One replay of a graph of two nodes, made at 10,000 ns and cloned; a third is unused."""
    _range(db, 9_900, 10_900, module_range(0, "self_attn"))
    for node in (1, 2, 3):
        event = {"start": 10_000 + node, "end": 10_001 + node, "globalTid": TID, "nameId": 4}
        put(db, "CUDA_GRAPH_NODE_EVENTS", graphNodeId=node, **event)
        event["start"] += 100
        put(db, "CUDA_GRAPH_NODE_EVENTS", graphNodeId=node + 100, originalGraphNodeId=node, **event)
    _range(db, start, start + 1_000, GRAPH_STEP)
    _call(db, start + 10, 900, TID, name=5)
    for node in (101, 102):
        _kernel(db, start + 2_000 * (node - 100), 900, node - 100, graphNodeId=node)
    # A kernel whose launch is not in the export, long after the last step.
    _kernel(db, 9_000_000, 999, 2)


def _machine(db: sqlite3.Connection) -> None:
    """What tells of the machine, where nsys writes it."""
    put(db, "OSRT_API", start=1, end=2, globalTid=TID, nameId=6)
    put(db, "ThreadNames", nameId=6, globalTid=TID)
    put(db, "PROCESSES", globalPid=PID, pid=1, name=f"/home/{USER}/venv/bin/python")
    put(db, "PROCESSES", globalPid=PID + (9 << 24), pid=9, name="sshd")
    gpu = "NVIDIA H100 80GB HBM3"
    put(db, "TARGET_INFO_GPU", name=gpu, busLocation="0000:1b:00.0", uuid="4df8")
    put(db, "TARGET_INFO_SESSION_START_TIME", utcEpochNs=1)
    put(db, "TARGET_INFO_SYSTEM_ENV", name="Hostname", value=HOST)
    for key, value in {
        "EXPORT_SCHEMA_VERSION": "3.11.1",
        "EXPORT_PRODUCT_VERSION": "2024.2.3.38",
        "EXPORT_HOST": HOST,
        "EXPORT_USER": USER,
        "EXPORT_PARAM_INPUT_PATH_ABS": f"/home/{USER}/run.nsys-rep",
    }.items():
        put(db, "META_DATA_EXPORT", name=key, value=value)
    for key, value in {
        "PROCESS_0:CUDA_GRAPH_TRACE_OPTIONS:MODE": "Node",
        "PROCESS_0:COMMAND": "vllm",
        "PROCESS_0:ENVIRONMENT_VARIABLE": 'HF_TOKEN="hf_abc"',
    }.items():
        put(db, "META_DATA_CAPTURE", name=key, value=value)
    note = f"Process was launched by the profiler, see /tmp/nvidia/q_1/pid_1_stdout.log on {HOST}"
    put(db, "DIAGNOSTIC_EVENT", severity=1, text=note)
    put(db, "DIAGNOSTIC_EVENT", severity=2, text="Not all CUDA events might have been collected.")
    put(db, "NVTX_EVENTS", start=8_000_000, end=8_000_001, eventType=59, textId=7, globalTid=TID)
    put(db, "NVTX_EVENTS", start=8_000_002, eventType=75, text="TensorRT-LLM", globalTid=TID)
    db.execute("CREATE TABLE OPKIT_MANIFEST (key TEXT, value TEXT)")
    manifest = (
        '{"side": "e2e", "command": ["vllm", "serve", "/home/alice.k/dsv32", "--api-key", "s3cret",'
        ' "--host", "10.3.90.33", "HF_HOME=/data/hf"], "versions": {"cublas": "12.4.5.8"}}'
    )
    put(db, "OPKIT_MANIFEST", key="manifest", value=manifest)
