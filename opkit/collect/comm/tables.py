"""From rows of collectives to the field's tables ``nccl`` and ``custom_allreduce``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from opkit.collect.comm.host import Host
from opkit.collect.comm.plan import CommCase
from opkit.collect.tables.latency import Latency
from opkit.collect.tables.provenance import About, Head
from opkit.collect.tables.write import Written, write_tables
from opkit.collect.work import Row
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode, Op, Table

_NCCL_COLUMNS = ("nccl_dtype", "num_gpus", "message_size")
_CUSTOM_COLUMNS = ("allreduce_dtype", "num_gpus", "message_size")
# What gloo took on a CPU is a table of its own name, so that nobody takes it for NCCL's.
TABLES = {
    "nccl": Table("nccl", "comm", _NCCL_COLUMNS, {"nccl": "NCCL"}),
    "gloo": Table("gloo", "comm", _NCCL_COLUMNS, {"gloo": "gloo"}),
    "vllm": Table("custom_allreduce", "comm", (*_CUSTOM_COLUMNS, "backend"), {}),
    "trtllm": Table(
        "custom_allreduce", "comm", (*_CUSTOM_COLUMNS, "implementation"), {"trtllm": "TRTLLM"}
    ),
}
# As the shipped tables of aiconfigurator 0.12.0 spell them, but for NCCL's, which say TRTLLM for
# the image in which they were collected. Its reader looks at none of them.
FRAMEWORKS = {"nccl": "NCCL", "gloo": "TORCH", "vllm": "vLLM", "trtllm": "TRTLLM"}


def columns_of(case: CommCase) -> dict[str, str | int | float]:
    """The table's columns of a case, but for the latency; ``message_size`` counts elements."""
    shared: dict[str, str | int | float] = {
        "op_name": case.op,
        "num_gpus": case.ranks,
        "message_size": case.message().total,
    }
    if case.implementation in ("nccl", "gloo"):
        return {**shared, "nccl_dtype": case.dtype}
    shared["allreduce_dtype"] = case.dtype
    if case.implementation == "trtllm":
        return {**shared, "implementation": "trtllm"}
    # The field's reader drops rows whose kernel_source or backend ends in _eager.
    mode = "graph" if case.launch is LaunchMode.GRAPH else "eager"
    return {**shared, "backend": f"vllm_{mode}", "kernel_source": f"vLLM_custom_{mode}"}


def in_tables(case: CommCase) -> bool:
    """Whether a case's row is written. One rank's is not: aiconfigurator takes the largest number
    of GPUs in a table for what was measured, and a table that ends at one makes collectives free.
    """
    return case.ranks > 1 or case.implementation == "gloo"


def write_comm_tables(
    implementation: str,
    rows: Sequence[Row],
    host: Host,
    manifests: Mapping[str, Manifest],
    out: Path,
    sweep: str,
) -> Written:
    """Write the table of one implementation below ``out``, as ``comm/nccl/2.29.2/``.

    Args:
        rows: of this implementation and these circumstances, with a value or without.
        manifests: by ``Row.build``.
        sweep: what was asked for, in words.

    Raises:
        BadInput: a file there is not opkit's, or cannot be written.
    """
    table = TABLES[implementation]
    version = host.version(implementation)
    about = About(
        head=Head(FRAMEWORKS[implementation], version, host.device()),
        backend=implementation,
        latency=Latency.ELAPSED,
        versions=manifests[rows[0].build].versions if rows else {},
        sweep=sweep,
        planned={table.name: len(rows)},
        manifests=manifests,
        flags={row.key: flags_of(row) for row in rows},
    )
    op = Op("comm", "collectives between GPUs", (), {}, tables={"": table})
    folder = out / "comm" / implementation / re.sub(r"[^A-Za-z0-9._+-]", "-", version)
    return write_tables(op, rows, about, folder)


def flags_of(row: Row) -> tuple[str, ...]:
    """Which algorithm answered, where the implementation has several, as ``served_by_nccl``."""
    served = str(row.case.get("served_by", ""))
    if not served or row.case["implementation"] in ("nccl", "gloo"):
        return ()
    return (f"served_by_{re.sub(r'[^a-z0-9]+', '_', served.lower())}",)
