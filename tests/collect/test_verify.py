"""Samples and comparisons of a collection with itself."""

from __future__ import annotations

from opkit.collect.measurement import Measurement
from opkit.collect.verify import compare, pick
from opkit.collect.work import Fault, Row


def row(key: str, table: str = "a", ok: bool = True) -> Row:
    measured = Measurement(elapsed_ms=(1.0,)) if ok else None
    return Row(key, "g", table, {}, {}, measured, None if ok else Fault.CRASH, "signal 11")


def test_a_sample_takes_from_each_table() -> None:
    rows = [row(f"a{i}") for i in range(100)] + [row(f"b{i}", "b") for i in range(5)]
    found = pick([*rows, row("x", "b", ok=False)], 20, seed=1)
    assert len({item.key for item in found}) == 20
    assert sum(item.table == "b" for item in found) == 5
    assert "x" not in {item.key for item in found}
    assert [r.key for r in pick(rows, 20, seed=1)] == [r.key for r in pick(rows, 20, seed=1)]


def test_deviations_and_what_is_outside() -> None:
    rows = [row("a"), row("b"), row("c")]
    first = {"a": 1.0, "b": 2.0, "c": 4.0}
    again = {"a": 1.001, "b": 2.05, "c": 3.99}
    found = compare(rows, {r.key: r for r in rows}, first, again, {k: k for k in first})
    assert [item.key for item in found.rows] == ["b", "c", "a"]
    assert round(found.worst, 6) == 0.025
    assert round(found.median, 6) == 0.0025
    assert [item.key for item in found.outside] == ["b"]
    assert not found.passed


def test_a_row_that_cannot_be_measured_again_fails() -> None:
    rows = [row("a"), row("b")]
    again = {"a": rows[0], "b": row("b", ok=False)}
    found = compare(rows, again, {"a": 1.0, "b": 1.0}, {"a": 1.0}, {"a": "A", "b": "B"})
    assert found.failed == ("B: signal 11",)
    assert found.outside == ()
    assert not found.passed
