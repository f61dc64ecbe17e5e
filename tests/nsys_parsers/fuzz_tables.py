"""Made exports with odd contents: hypothesis draws rows, odd cells, shapes and forms of tables."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from made_export import (
    COPY,
    EAGER_STEP,
    GEMM,
    GRAPH_STEP,
    OTHER_PID,
    PID,
    SCHEMA,
    TID,
    TOPK,
    module_range,
)  # fmt: skip

Row = dict[str, Any]
KERNEL, RUNTIME = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME"
MEMCPY, MEMSET = "CUPTI_ACTIVITY_KIND_MEMCPY", "CUPTI_ACTIVITY_KIND_MEMSET"
NODES, NVTX, STRINGS = "CUDA_GRAPH_NODE_EVENTS", "NVTX_EVENTS", "StringIds"
GRAPHS = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"
BATCH = 20  # examples drawn at a time
MIN, MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Raw:
    """Bytes to be stored as text: SQLite does not look whether they are UTF-8."""

    data: bytes


TRTLLM = "[Executor] _forward_step 12: 1 ctx reqs, 1024 ctx tokens, 4 gen reqs"
LONG = [
    "A" * 100_000,
    "a." * 50_000,
    "a/" * 30_000,
    "0." * 3_000,
    f"void elementwise_kernel<{'w' * 100_000}>(int)",
    f"elementwise_kernel<{'Functor' * 9_000}",
    "cutlass::Kernel<" * 6_000,
    "void cutlass::device_kernel<" * 400 + ">" * 400,
    "std::enable_if<" * 7_000,
    "(int)" * 20_000,
    "nvjet_" + "1x1_" * 20_000,
    "<" * 100_000,
    "lambda(" * 10_000,
    "{'Module': '" + "layers.0." * 10_000 + "'}",
    "execute_context_1(1)_generation_" * 3_000,
]
TEXTS: list[str | Raw] = [
    GEMM, TOPK, COPY, EAGER_STEP, GRAPH_STEP, TRTLLM, module_range(0, "mlp"),
    module_range(1, "self_attn"), module_range(1, "self_attn", True), "{'Module': ''}",
    "{'Module': 'a.b', 'Outputs':", "", " ", ".", "/", "../..", "a/b.c", "layers.0.mlp", "\n\r\t",
    "x'; DROP TABLE kernel; --", '"', "'", "%s%n{}", "[memset]", "[memcpy DtoD]", "[/bold]",
    "<unnamed kernel>", "(", "\\d+[", "(?i", "<<<<>>>>", ">>>(", "->(", ")))", "operator()",
    "std::enable_if<T>::type ", "execute_context_99999999999999999999(1)_generation_0(0)",
    f"execute_context_{'9' * 5_000}(1)_generation_0(0)", "execute_context_٣(٣)_generation_٣(٣)",
    "[Executor] _forward_step 1: 99999999999999999999 ctx reqs, 0 gen reqs", "NaN", "null",
    "\x00", "a\x00b", "\ufeff", "\u2028", "\U0010ffff", "\x1b[31m", "\ud7ff", "aten::mm, seq = 3",
    Raw(b"\xff\xfe"), Raw(b"\xed\xa0\x80"), Raw(b"caf\xe9"), Raw(b"\xf0\x9f"), Raw(b"a\x00\xff"),
]  # fmt: skip
TEXT = st.one_of(st.sampled_from(TEXTS), st.sampled_from(TEXTS[:9]), st.text(max_size=9))
EDGES = [
    -1, 0, MIN, MAX, MIN + 1, MAX - 1, 2**31, 2**32, 2**53 + 1, 2**62, -(2**62), 2**24, 10**18,
]  # fmt: skip
EDGE = st.one_of(st.none(), st.sampled_from(EDGES), st.integers(MIN, MAX))
ANYTHING = st.one_of(
    EDGE,
    st.sampled_from(["", "12", "abc", "1e3", " 7", "0x1F", "nan"]),
    st.sampled_from([b"", b"\xff\x00", b"12", Raw(b"\xff"), Raw(b"7"), 0.5, 1e300, float("inf")]),
)
_TIME, _SMALL = st.integers(0, 3_000), st.integers(0, 6)
_TID = st.sampled_from([TID, TID, TID + 1, OTHER_PID + 3, OTHER_PID])
_ID, _MAYBE_NODE = st.integers(1, 8), st.one_of(st.none(), _SMALL)
_GPU = {
    "start": _TIME, "end": _TIME, "deviceId": st.integers(0, 1), "streamId": st.integers(7, 8),
    "correlationId": _SMALL, "globalPid": st.sampled_from([PID, PID, OTHER_PID]),
    "graphNodeId": _MAYBE_NODE,
}  # fmt: skip
READ: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    KERNEL: {**_GPU, "demangledName": _ID, "shortName": _ID, "gridX": _SMALL},
    RUNTIME: {"start": _TIME, "end": _TIME, "globalTid": _TID, "correlationId": _SMALL},
    NVTX: {
        "start": _TIME, "end": st.one_of(st.none(), _TIME, _TIME), "globalTid": _TID,
        "eventType": st.sampled_from([59, 59, 59, 60, 70, 71, 34, 75, 99]),
        "text": st.one_of(st.none(), TEXT), "textId": st.one_of(st.none(), _ID),
    },
    NODES: {
        "start": _TIME, "globalTid": _TID, "graphNodeId": _SMALL,
        "originalGraphNodeId": _MAYBE_NODE,
    },
    MEMCPY: {**_GPU, "copyKind": st.sampled_from([1, 2, 8, 99, 1_000])},
    MEMSET: _GPU,
    STRINGS: {"id": st.integers(1, 12), "value": TEXT},
    "TARGET_INFO_GPU": {"name": TEXT, "smCount": _SMALL},
    "TARGET_INFO_SESSION_START_TIME": {"utcEpochNs": st.integers(0, 10)},
    "META_DATA_EXPORT": {"name": st.just("EXPORT_SCHEMA_VERSION"), "value": TEXT},
    "META_DATA_CAPTURE": {"name": st.just("P_0:CUDA_GRAPH_TRACE_OPTIONS:MODE"), "value": TEXT},
    "DIAGNOSTIC_EVENT": {"text": st.sampled_from(["events were lost", "a\nb", "not all"])},
    GRAPHS: {"start": _TIME, "end": _TIME},
    "OPKIT_MANIFEST": {"key": st.just("manifest"), "value": TEXT},
}  # fmt: skip
MOST = {KERNEL: 12, RUNTIME: 10, NVTX: 12, NODES: 8, STRINGS: 8, GRAPHS: 1}
ALWAYS = {KERNEL, STRINGS}
FORMS = [
    "drop", "rename", "view", "shuffle", "extra", "untyped", "no rowid", "strict", "large rowid",
    "negative rowid", "upper", "generated", "empty", "twice",
]  # fmt: skip
TYPES = [
    "TEXT",
    "REAL",
    "BLOB",
    "DATE",
    "BOOLEAN",
    "VARCHAR(3)",
    "DECIMAL(4,2)",
    "ANY",
    "TIMESTAMP",
]
SHAPES = [
    "deep", "crossing", "long texts", "deep long texts", "cycle", "chain", "many kernels",
    "many ranges", "no launches", "one correlation", "open ranges",
]  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What hypothesis draws."""

    rows: dict[str, list[Row]]
    odd: list[tuple[str, int, int, Any]]  # table, which row, which column, value
    forms: list[tuple[str, str]]  # table, form
    shapes: list[str]


def _odd(wild: bool) -> st.SearchStrategy[tuple[str, int, int, Any]]:
    tables = st.one_of(st.sampled_from([KERNEL, RUNTIME, NVTX, NODES, STRINGS]),
                       st.sampled_from(sorted(READ)))  # fmt: skip
    return st.tuples(tables, st.integers(0, 99), st.integers(0, 11), ANYTHING if wild else EDGE)


def _form() -> st.SearchStrategy[tuple[str, str]]:
    column = st.builds(
        lambda what, n: f"{what} {n}", st.sampled_from(["lose", *TYPES]), st.integers(0, 11)
    )
    forms = st.one_of(st.sampled_from(FORMS), column)
    return st.tuples(
        st.sampled_from([KERNEL, RUNTIME, NVTX, NODES, STRINGS, MEMCPY, GRAPHS]), forms
    )


CONTENTS = st.builds(
    Contents,
    rows=st.fixed_dictionaries(
        {
            table: st.lists(
                st.fixed_dictionaries(columns),
                min_size=int(table in ALWAYS), max_size=MOST.get(table, 2),
            )
            for table, columns in READ.items()
        }
    ),
    odd=st.one_of(
        st.just([]), st.lists(_odd(False), max_size=3), st.lists(_odd(True), min_size=1, max_size=2)
    ),
    forms=st.one_of(st.just([]), st.just([]), st.lists(_form(), min_size=1, max_size=2)),
    shapes=st.one_of(st.just([]), st.just([]), st.lists(st.sampled_from(SHAPES), max_size=2)),
)  # fmt: skip


@lru_cache(maxsize=2)
def drawn(run: int, batch: int) -> list[Contents]:
    """``BATCH`` examples, always the same for a run and a batch."""
    found: list[Contents] = []

    @seed(run * 1_000_003 + batch)
    @settings(
        max_examples=BATCH + 1, database=None, phases=[Phase.generate], deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(CONTENTS)
    def collect(contents: Contents) -> None:
        found.append(contents)

    collect()
    return found[1:] or found  # the first is the simplest, in every batch


def made_tables(run: int, number: int, path: Path) -> Path:
    """Write the ``number``-th example of a run."""
    found = drawn(run, number // BATCH)
    return write(found[number % BATCH % len(found)], path)


def write(contents: Contents, path: Path) -> Path:
    """Write an export with these contents; columns that are not drawn hold 0."""
    rows = {table: [dict(row) for row in drawn] for table, drawn in contents.rows.items()}
    for table, row, column, value in contents.odd:
        if rows[table]:
            names = list(READ[table])
            rows[table][row % len(rows[table])][names[column % len(names)]] = value
    for shape in contents.shapes:
        _shape(shape, rows)
    db = sqlite3.connect(path)
    db.execute("PRAGMA synchronous = off")
    for table, types in _schema().items():
        if table not in rows or rows[table]:
            forms = [form for of, form in contents.forms if of == table]
            _table(db, table, types, rows.get(table, []), forms)
    db.commit()
    db.close()
    return path


@lru_cache(maxsize=1)
def _schema() -> dict[str, dict[str, str]]:
    """Tables, columns and their types; without NOT NULL, so that any cell can be null."""
    db = sqlite3.connect(":memory:")
    db.executescript(SCHEMA)
    db.execute(f"CREATE TABLE {GRAPHS} (start INTEGER, end INTEGER, graphId INTEGER)")
    db.execute("CREATE TABLE OPKIT_MANIFEST (key TEXT, value TEXT)")
    names = [r[0] for r in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        name: {row[1]: row[2] for row in db.execute(f"PRAGMA table_info({name})")} for name in names
    }


def _shape(shape: str, rows: dict[str, list[Row]]) -> None:
    """Rows that no example of a few would hold."""

    def ranges(count: int, start: int, end: int, step: int, texts: list[Any]) -> None:
        rows[NVTX] += [
            {"start": start + i, "end": None if step == 99 else end + step * i, "globalTid": TID,
             "eventType": 59, "text": texts[i % len(texts)]}
            for i in range(count)
        ]  # fmt: skip

    match shape:
        case "deep":
            ranges(3_000, 0, 9_000, -1, ["a", "layers.0", module_range(0, "mlp")])
        case "crossing":
            ranges(3_000, 0, 4_000, 1, ["a", EAGER_STEP])
        case "open ranges":
            ranges(50, 0, 0, 99, ["a", EAGER_STEP])
        case "long texts":
            rows[STRINGS] += [{"id": 20 + i, "value": text} for i, text in enumerate(LONG)]
            ranges(len(LONG), 0, 100, 0, LONG)
            for number in range(len(LONG)):
                row = dict.fromkeys(READ[KERNEL], 1)
                rows[KERNEL].append(row | {"demangledName": 20 + number, "globalPid": PID})
        case "deep long texts":
            ranges(70, 0, 9_000, -1, ["A" * 100_000 + str(i) for i in range(70)])
        case "cycle":
            rows[NODES] += [
                {"start": i, "globalTid": TID, "graphNodeId": i, "originalGraphNodeId": (i + 1) % 7}
                for i in range(7)
            ]
        case "chain":
            rows[NODES] += [
                {"start": i, "globalTid": TID, "graphNodeId": i, "originalGraphNodeId": i - 1}
                for i in range(300)
            ]
        case "many kernels":
            rows[KERNEL] += [row | {"start": i} for i in range(400) for row in rows[KERNEL][:5]]
        case "many ranges":
            rows[NVTX] += [row | {"start": i} for i in range(400) for row in rows[NVTX][:5]]
        case "no launches":
            rows[RUNTIME].clear()
        case "one correlation":
            for table in (KERNEL, RUNTIME):
                rows[table][:] = [row | {"correlationId": 1} for row in rows[table]]


def _table(
    db: sqlite3.Connection, table: str, types: dict[str, str], rows: list[Row], forms: list[str]
) -> None:
    """Create and fill a table in odd forms."""
    name, tail, types, extra = table, "", dict(types), ""
    for form in forms:
        what, _, number = form.rpartition(" ")
        read = [column for column in READ.get(table, {}) if column in types]
        if form in ("view", "rename"):
            name = f"{table}_old"
        elif form == "shuffle":
            types = dict(sorted(types.items()))
        elif form == "extra":
            extra = ', "x y" TEXT DEFAULT \'z\', "rowid" INTEGER, "sel""ect" BLOB'
        elif form == "untyped":
            types = dict.fromkeys(types, "")
        elif form == "no rowid":
            extra, tail = ', "opk" INTEGER PRIMARY KEY', "WITHOUT ROWID"
        elif form == "strict":
            tail = "STRICT"
        elif form == "upper":
            types = {column.upper(): kind for column, kind in types.items()}
        elif form == "generated" and "end" in types:
            extra, types = (
                ', "end" INTEGER AS (start + 1)',
                {k: t for k, t in types.items() if k != "end"},
            )
        elif what == "lose" and read:
            types.pop(read[int(number) % len(read)])
        elif what in TYPES and read:
            types[read[int(number) % len(read)]] = what
    if "drop" in forms:
        return
    if tail == "STRICT":
        types = dict.fromkeys(types, "ANY")
    listed = ", ".join(f'"{column}" {kind}' for column, kind in types.items())
    db.execute(f'CREATE TABLE "{name}" ({listed}{extra}) {tail}')
    for number, row in enumerate([] if "empty" in forms else rows):
        same = {column.upper(): cell for column, cell in row.items()}
        cells = {
            column: same.get(column.upper(), 0 if "Id" not in column else None) for column in types
        }
        if "no rowid" in forms:
            cells["opk"] = number
        marks = ", ".join("CAST(? AS TEXT)" if isinstance(c, Raw) else "?" for c in cells.values())
        values = [c.data if isinstance(c, Raw) else c for c in cells.values()]
        columns = ", ".join(f'"{column}"' for column in cells)
        db.execute(f'INSERT INTO "{name}" ({columns}) VALUES ({marks})', values)
    if "view" in forms:
        db.execute(f'CREATE VIEW "{table}" AS SELECT * FROM "{name}"')
    if "twice" in forms:
        db.execute(f'CREATE TABLE "{table}""2" AS SELECT * FROM "{name}"')
    if tail != "WITHOUT ROWID" and "rowid" in " ".join(forms):
        sign = 1 if "large rowid" in forms else -1
        db.execute(f'UPDATE "{name}" SET _rowid_ = {sign * 2**62} + {sign} * _rowid_')
