"""A benchmark's summary read back, as `opkit report` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opkit.bench.result import SCHEMA, Bench, Context, Failure, Row
from opkit.errors import BadInput, what_is_wrong


def bench_from_json(data: Mapping[str, Any], origin: str) -> Bench:
    """Read back what :meth:`opkit.bench.result.Bench.as_json` made.

    Args:
        data: the JSON object.
        origin: where it comes from, for the error.

    Raises:
        BadInput: the data is no benchmark of this schema.
    """
    if data.get("schema") != SCHEMA:
        raise BadInput(f"{origin}: not a benchmark of schema {SCHEMA}")
    try:
        return Bench(
            opkit=data["opkit"],
            started=data["started"],
            folder=data["folder"],
            interrupted=data["interrupted"],
            models=[Context(**each) for each in data["models"]],
            rows=[Row(**_tuples(each)) for each in data["results"]],
            failures=[Failure(**each) for each in data["failures"]],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{origin}: a damaged benchmark ({what_is_wrong(error)})") from error


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; a row's are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
