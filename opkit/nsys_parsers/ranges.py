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

from opkit.nsys_parsers.export import Columns
from opkit.nsys_parsers.kernels import THREAD_BITS
from opkit.nsys_parsers.strings import clean_texts

NVTX_TABLE = "NVTX_EVENTS"
RANGE_EVENTS = (59, 60, 70, 71)  # push/pop and start/end ranges, of NVTX and of NVTX text files
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


# Counts of more than 12 digits are no counts.
# vLLM 0.24, v1/worker/gpu_worker.py annotate_profile.
_VLLM_STEP = re.compile(
    r"execute_context_(\d{1,12})\((\d{1,12})\)_generation_(\d{1,12})\((\d{1,12})\)"
)
# TensorRT-LLM, _torch/pyexecutor/py_executor.py _forward_step; context tokens since May 2026.
_TRTLLM_STEP = re.compile(
    r"\[Executor\] _forward_step \d+: (\d{1,12}) ctx reqs, "
    r"(?:(\d{1,12}) ctx tokens, )?(\d{1,12}) gen reqs"
)
# SGLang 0.5.14, model_executor/model_runner.py _build_step_span_name; a range where a forward hook
# makes it one (opkit/layers/backends/sglang/labels.py).
_SGLANG_STEP = re.compile(r"step\[(?:EXTEND bs=(\d{1,12}) toks=(\d{1,12})|DECODE bs=(\d{1,12}))\]")
# The same as one DuckDB expression, to select candidate rows before Python looks at distinct texts.
STEP_SQL = (
    r"execute_context_\d+\(\d+\)_generation_\d+\(\d+\)|_forward_step \d+: \d+ ctx reqs"
    r"|step\[(?:EXTEND bs=\d+ toks=\d+|DECODE bs=\d+)\]"
)
# What torch.autograd.profiler.emit_nvtx appends to an operator's name: a number of its own.
COUNTER_SQL = r", (?:seq|op_id) = \d+.*$"
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
    found = _SGLANG_STEP.search(text)
    if found and found[3] is None:
        return StepLabel(int(found[1]), int(found[2]), 0, 0)
    if found:
        return StepLabel(0, 0, int(found[3]), int(found[3]))
    return None


def load(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Create ``range(tid, end_tid, start, "end", text)``: every range with a text, texts in
    ``label(id, text)``; ``text`` is the label's id. Needs table ``string``.

    A text stands in the row itself or, registered, in ``StringIds``; both occur in one file.
    """
    have = columns.get(NVTX_TABLE, frozenset())
    if not {"start", "end", "globalTid"} <= have:
        db.execute("CREATE TABLE label (id BIGINT, text VARCHAR)")
        db.execute(
            'CREATE TABLE range (tid BIGINT, end_tid BIGINT, start BIGINT, "end" BIGINT, '
            "text BIGINT)"
        )
        return
    inline = "encode(text::VARCHAR)" if "text" in have else "NULL::BLOB"
    registered = '"textId"::BIGINT' if "textId" in have else "NULL::BIGINT"
    other = '"endGlobalTid"::BIGINT' if "endGlobalTid" in have else "NULL::BIGINT"
    kinds = f'AND "eventType" IN {RANGE_EVENTS}' if "eventType" in have else ""
    db.execute(
        f"""
        CREATE TABLE event AS
        SELECT "globalTid"::BIGINT AS tid, {other} AS end_tid, start::BIGINT AS start,
               coalesce("end"::BIGINT, {STILL_OPEN}) AS "end",
               {inline} AS raw, {registered} AS text_id
        FROM export.{NVTX_TABLE}
        WHERE start IS NOT NULL AND "globalTid" IS NOT NULL {kinds}
        """
    )
    clean_texts(db, "event")
    db.execute(
        """
        CREATE TABLE label AS
        SELECT row_number() OVER () AS id, text FROM (
            SELECT text FROM event_text UNION
            SELECT s.value FROM string s
            WHERE s.id IN (SELECT DISTINCT text_id FROM event WHERE raw IS NULL))
        """
    )
    db.execute(
        """
        CREATE TABLE range AS
        WITH inline AS (SELECT t.raw, l.id FROM event_text t JOIN label l USING (text)),
        registered AS (SELECT s.id AS text_id, l.id FROM string s JOIN label l ON l.text = s.value)
        SELECT e.tid, e.end_tid, e.start, e."end", coalesce(i.id, r.id) AS text
        FROM event e LEFT JOIN inline i ON i.raw = e.raw
        LEFT JOIN registered r ON e.raw IS NULL AND r.text_id = e.text_id
        WHERE coalesce(i.id, r.id) IS NOT NULL
        """
    )
    db.execute("DROP TABLE event; DROP TABLE event_text")


def build(db: duckdb.DuckDBPyConnection, columns: Columns) -> None:
    """Create table ``nvtx``: ``id, tid, pid, start, "end", text`` of every range with a text."""
    load(db, columns)
    db.execute(
        f"""
        CREATE TABLE nvtx AS
        SELECT row_number() OVER (ORDER BY r.start, r."end" DESC) AS id, r.tid,
               r.tid - (r.tid & {THREAD_BITS}) AS pid, r.start, r."end", l.text
        FROM range r JOIN label l ON l.id = r.text
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
