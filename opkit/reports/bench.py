"""What a benchmark found, as Markdown, CSV, JSON or JSON lines. Computes nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import PurePath
from typing import Any

from opkit.bench.result import SCHEMA, Bench, Context, Row

FORMATS = ("md", "json", "jsonl", "csv")
_MS, _UNKNOWN = 1e6, "–"


def render_bench(bench: Bench, form: str) -> str:
    """The result in one of :data:`FORMATS`, ending in a newline."""
    return {"md": _markdown, "json": _json, "jsonl": _jsonl, "csv": _csv}[form](bench)


def _json(bench: Bench) -> str:
    return json.dumps(bench.as_json(), indent=1, ensure_ascii=False) + "\n"


def _jsonl(bench: Bench) -> str:
    """One line a test, with the schema in each."""
    rows = [{"schema": SCHEMA, **asdict(row)} for row in bench.rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(bench: Bench) -> str:
    """One row a test. Lists and truths are JSON in a cell; what is not known is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in bench.rows:
        writer.writerow([_cell(value) for value in asdict(row).values()])
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (bool, list, tuple)):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else value


# Heading with its unit, and what stands below; numbers are set to the right.
_COLUMNS: tuple[tuple[str, bool, Callable[[Row], str]], ...] = (
    ("model", False, lambda row: PurePath(row.model).name),
    ("backend", False, lambda row: f"{row.backend} {row.engine_version}".strip()),
    ("test", False, lambda row: row.test),
    ("tokens/s", True, lambda row: _spread(row.avg_ts, row.stddev_ts)),
    ("TTFT ms", True, lambda row: _spread(row.ttft_avg_ns, row.ttft_stddev_ns, _MS, 3)),
    ("ITL ms", True, lambda row: _spread(row.itl_avg_ns, row.itl_stddev_ns, _MS, 3)),
    ("power W", True, lambda row: _number(row.watts, 1)),
    ("J/token", True, lambda row: _number(row.joules_per_token, 4)),
    ("max °C", True, lambda row: _number(row.temp_max_c, 0)),
    ("clock MHz", True, lambda row: _number(row.clock_avg_mhz, 0)),
)


def _markdown(bench: Bench) -> str:
    """llama-bench's table, wider by latencies and power; what failed and what to know below it."""
    servers = {_key(each): str(each.engine.get("owned_by") or "") for each in bench.models}
    rows = [_named(row, servers.get(_key(row), "")) for row in bench.rows]
    table = _table([[text(row) for _, _, text in _COLUMNS] for row in rows])
    return "\n".join([*table, *[""][: len(table)], *(line + "  " for line in _below(bench))]) + "\n"


def _key(of: Row | Context) -> tuple[str, str, str]:
    return of.model, of.backend, of.engine_version


def _named(row: Row, server: str) -> Row:
    """With what a server calls itself before its version, as ``openai-url vllm 0.24.0``."""
    return replace(row, engine_version=f"{server} {row.engine_version}".strip())


def _table(cells: list[list[str]]) -> list[str]:
    """Lines of a Markdown table that is also one in a terminal; none without rows."""
    if not cells:
        return []
    cells = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    titles = [title for title, _, _ in _COLUMNS]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    right = [right for _, right, _ in _COLUMNS]
    rules = ["-" * (width - 1) + ("-", ":")[at] for width, at in zip(widths, right, strict=True)]
    return [_line(line, widths, right) for line in (titles, rules, *cells)]


def _below(bench: Bench) -> list[str]:
    """Sentences under the table, one a line."""
    said = [f"GPU: {gpu}." for gpu in dict.fromkeys(row.gpu for row in bench.rows) if gpu]
    ways = dict.fromkeys((row.power_scope, row.power_method) for row in bench.rows)
    said += [f"Power: {scope}, by {method}." for scope, method in ways if method]
    if bench.rows and not any(row.power_method for row in bench.rows):
        said.append("Power: not measured, since no sensors tell it here.")
    said += [f"{row.test}: {note}." for row in bench.rows for note in row.notes]
    said += [f"{row.test}: clocks lowered by {', '.join(row.throttle)}." for row in bench.rows
             if row.throttle]  # fmt: skip
    said += [f"FAILED {each.test or each.model}: {each.why}" for each in bench.failures]
    if bench.interrupted:
        said.append("Interrupted: this is what was measured until then.")
    return said


def _line(cells: list[str], widths: list[int], right: list[bool]) -> str:
    padded = [
        cell.rjust(width) if at_right else cell.ljust(width)
        for cell, width, at_right in zip(cells, widths, right, strict=True)
    ]
    return "| " + " | ".join(padded) + " |"


def _spread(value: float | None, spread: float | None, unit: float = 1.0, digits: int = 2) -> str:
    if value is None:
        return _UNKNOWN
    around = "" if spread is None else f" ± {spread / unit:,.{digits}f}"
    return f"{value / unit:,.{digits}f}{around}"


def _number(value: float | None, digits: int) -> str:
    return _UNKNOWN if value is None else f"{value:,.{digits}f}"
