"""NVTX ranges: the labels that servers and mocks emit, and which kernels were launched inside
which.

A kernel belongs to a range when its launch (or the creation of its graph node) lies within the
range on the same thread. For a set of ranges that do not overlap on a thread (forward steps, one
op's module ranges, a mock's iterations) the latest range that began before the launch is the only
candidate: an ASOF join, linear after sorting.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import duckdb

NVTX_TABLE = "NVTX_EVENTS"
RANGE_EVENTS = (59, 60)  # push/pop range, start/end range
STILL_OPEN = 2**62  # end of a range that the window cut off


@dataclass(frozen=True)
class StepLabel:
    """What a forward step's label says; ``None`` where the engine does not say it.

    Requests and new tokens in the step, by phase.
    """

    context_requests: int
    context_tokens: int | None
    generation_requests: int
    generation_tokens: int | None


# vLLM 0.24, v1/worker/gpu_worker.py annotate_profile.
_VLLM_STEP = re.compile(r"execute_context_(\d+)\((\d+)\)_generation_(\d+)\((\d+)\)")
# TensorRT-LLM, _torch/pyexecutor/py_executor.py _forward_step; context tokens since May 2026.
_TRTLLM_STEP = re.compile(
    r"\[Executor\] _forward_step \d+: (\d+) ctx reqs, (?:(\d+) ctx tokens, )?(\d+) gen reqs"
)
# The same as one DuckDB expression, to select candidate rows before Python looks at distinct texts.
STEP_SQL = r"execute_context_\d+\(\d+\)_generation_\d+\(\d+\)|_forward_step \d+: \d+ ctx reqs"
# Layerwise markers of vLLM, SGLang and TensorRT-LLM: {'Module': 'path', …}; the twin has 'Outputs'.
MODULE_SQL = r"'Module': '([^']*)'"


def parse_step(text: str) -> StepLabel | None:
    """Read a forward step's label, or None when ``text`` is something else."""
    found = _VLLM_STEP.search(text)
    if found:
        return StepLabel(int(found[1]), int(found[2]), int(found[3]), int(found[4]))
    found = _TRTLLM_STEP.search(text)
    if found:
        tokens = int(found[2]) if found[2] is not None else None
        return StepLabel(int(found[1]), tokens, int(found[3]), int(found[3]))
    return None


def build(db: duckdb.DuckDBPyConnection, columns: dict[str, frozenset[str]]) -> None:
    """Create table ``nvtx``: ``id, tid, pid, start, "end", text`` of every range with a text."""
    have = columns.get(NVTX_TABLE, frozenset())
    if not {"start", "end", "globalTid"} <= have:
        db.execute(
            'CREATE TABLE nvtx (id BIGINT, tid BIGINT, pid BIGINT, start BIGINT, "end" BIGINT, '
            "text VARCHAR)"
        )
        return
    text = "n.text" if "text" in have else "NULL"
    registered = "textId" in have and "StringIds" in columns
    join = 'LEFT JOIN export.StringIds s ON s.id = n."textId"' if registered else ""
    value = f"coalesce({text}, s.value)" if registered else text
    kinds = f'AND n."eventType" IN {RANGE_EVENTS}' if "eventType" in have else ""
    db.execute(
        f"""
        CREATE TABLE nvtx AS
        SELECT row_number() OVER (ORDER BY n.start, n."end" DESC) AS id, n."globalTid" AS tid,
               n."globalTid" - (n."globalTid" & {0xFFFFFF}) AS pid, n.start,
               coalesce(n."end", {STILL_OPEN}) AS "end", {value} AS text
        FROM export.{NVTX_TABLE} n {join}
        WHERE {value} IS NOT NULL {kinds}
        """
    )


def assign(db: duckdb.DuckDBPyConnection, target: str, where: str, point: str = "launch") -> None:
    """Create table ``target(kernel_id, range_id)``: the kernels launched inside the chosen ranges.

    Args:
        db: the trace's connection.
        target: name of the table to create.
        where: SQL condition over ``nvtx`` that selects ranges which do not overlap on a thread.
        point: ``launch`` (the launch call) or ``node`` (the creation of the graph node).
    """
    db.execute(
        f"""
        CREATE OR REPLACE TABLE {target} AS
        WITH chosen AS (SELECT id, tid, start, "end" FROM nvtx WHERE {where}),
        placed AS (
            SELECT k.id AS kernel_id, c.id AS range_id, k.{point}_start AS moment, c."end" AS until
            FROM (SELECT id, {point}_start, {point}_tid FROM kernel
                  WHERE {point}_start IS NOT NULL) k
            ASOF JOIN chosen c ON c.tid = k.{point}_tid AND c.start <= k.{point}_start
        )
        SELECT kernel_id, range_id FROM placed WHERE moment <= until
        """
    )
