"""The reports of ``opkit trace`` in the terminal: aligned tables, times in the unit that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from opkit.nsys_parsers.views.diff import Diff, Difference, Side
from opkit.nsys_parsers.views.summary import Attributed, Summary
from opkit.reports.columns import NARROWEST_FLEXIBLE, NOTHING, Column, table

WIDEST = 160
NO_MODULE = "(in no range)"
Row = dict[str, Any]
Cell = Callable[[Row], Text]


def duration(ns: float | None) -> str:
    """A time in the unit that fits: ``812 ns``, ``61.4 µs``, ``7.15 ms``, ``2.31 s``."""
    if ns is None:
        return "–"
    for limit, unit, scale in ((1e3, "ns", 1), (1e6, "µs", 1e3), (1e9, "ms", 1e6)):
        if abs(ns) < limit:
            return f"{ns / scale:.4g} {unit}" if scale > 1 else f"{ns:.0f} {unit}"
    return f"{ns / 1e9:,.4g} s" if abs(ns) < 1e12 else f"{ns / 1e9:,.0f} s"


def print_kernels(
    rows: Sequence[Row], about: Row, more: int, console: Console, level: str = "demangled"
) -> None:
    """Kernels by name, longest total first; ``more`` are not shown.

    Args:
        level: what ``name`` of a row is: ``demangled``, ``short`` or ``family``.
    """
    by_family = level == "family"
    columns = [
        _share(rows),
        _time("total", rows, "total_ns"),
        _count("calls", rows, "calls"),
        _time("median", rows, "median_ns"),
        _time("min", rows, "min_ns", leaves=3),
        _time("max", rows, "max_ns", leaves=3),
        _time("std dev", rows, "stddev_ns", leaves=4),
        Column("in graphs", [_part(r["graph_calls"], r["calls"]) for r in rows], True, leaves=5),
        # What is grouped by never leaves.
        Column(
            "family", [Text(r["family"], style="cyan") for r in rows], leaves=0 if by_family else 2,
        ),
        Column(
            "most in" if by_family else "kernel", [Text(r["short"]) for r in rows], flexible=True,
            narrowest=28 if by_family else NARROWEST_FLEXIBLE, leaves=int(by_family),
        ),
    ]  # fmt: skip
    _show(columns, more, "families" if by_family else "kernel names", console)
    _lost(about, console)


def print_steps(rows: Sequence[Row], about: Row, more: int, console: Console) -> None:
    """Forward steps in their order."""
    ranks = "ranks" if about["ranks_together"] else "rank"
    columns = [
        _count("step", rows, "step"),
        _count(ranks, rows, ranks, leaves=3),
        _time("at", rows, "start_ns"),
        Column("context", [_requests(r, "context") for r in rows], right=True),
        Column("generation", [_requests(r, "generation") for r in rows], right=True),
        _time("GPU span", rows, "span_ns"),
        _time("GPU time", rows, "gpu_ns"),
        _count("launches", rows, "launches"),
        _count("in graphs", rows, "graph_launches", leaves=2),
        _time("host", rows, "host_ns", leaves=4),
        Column(
            "label", [Text(r["label"] or "", style="dim") for r in rows], flexible=True, leaves=5
        ),
    ]
    _show(columns, more, "steps", console)
    if about["steps_by"] == "graph launch":
        seen = "each launch of a graph is listed" if rows else "no graph was launched"
        console.print(Text(
            f"no step is labelled, {seen}; --step-pattern names ranges that are steps, "
            "--gap-us cuts at pauses", style="yellow",
        ))  # fmt: skip
    outside = about["unattributed"]
    if outside["executions"]:
        console.print(Text(
            f"{outside['executions']:,} launches ({duration(outside['ns'])} of GPU time) lie in no "
            "step", style="dim",
        ))  # fmt: skip


def print_modules(rows: Sequence[Row], about: Row, more: int, console: Console) -> None:
    """Time by module path, inclusive."""
    columns = [
        _share(rows),
        _time("total", rows, "total_ns"),
        _time("self", rows, "self_ns"),
        _count("launches", rows, "calls"),
        _count("steps", rows, "steps", leaves=3),
        Column("found by", [_ways(r) for r in rows], leaves=2),
        Column("module", [
            Text(r["path"]) if r["path"] else Text(NO_MODULE, style="yellow") for r in rows
        ], flexible=True, tail=True),
    ]  # fmt: skip
    _show(columns, more, "modules", console)
    whole = max(about["total_ns"], 1)
    ways = about["attributed_ns"]
    said = [f"{ns / whole:.1%} by {way.replace('_', ' ')}" for way, ns in ways.items() if ns]
    none = about["unattributed"]
    said.append(f"{none['ns'] / whole:.1%} ({none['executions']:,} launches) in no range")
    console.print(Text(f"of {duration(about['total_ns'])} GPU time: " + ", ".join(said), "dim"))


def print_sequence(rows: Sequence[Row], about: Row, more: int, console: Console) -> None:
    """What a region launched, in capture order."""
    head = f"region: {about['region']}"
    if rows and rows[0]["step"] is not None and about["regions"] > 1:
        head += (
            f"; the first of {about['regions']:,} (step {rows[0]['step']}, rank {rows[0]['rank']})"
        )
    elif about["regions"] > 1:
        head += f"; the first of {about['regions']:,}"
    console.print(Text(head, style="bold"))
    columns = [
        _count("#", rows, "position"),
        _time("at", rows, "start_ns"),
        _time("took", rows, "duration_ns"),
        Column("grid", [_size(r, "grid") for r in rows], right=True, leaves=2),
        Column("block", [_size(r, "block") for r in rows], right=True, leaves=3),
        _count("stream", rows, "stream", leaves=4),
        Column("mode", [Text(r["mode"]) for r in rows], leaves=4),
        Column("module", [Text(_last(r["module"]), style="dim") for r in rows], leaves=5),
        Column("family", [Text(r["family"], style="cyan") for r in rows], leaves=2),
        Column("kernel", [Text(r["short"]) for r in rows], flexible=True),
    ]
    _show(columns, more, "launches", console)
    if about["unattributed"]["launch"]:
        console.print(Text(
            f"{about['unattributed']['launch']:,} have no launch in the export; they stand where "
            "they ran", style="yellow",
        ))  # fmt: skip


def print_diff(found: Diff, names: tuple[str, str], everything: bool, console: Console) -> None:
    """What two sides launch differently, or that they do not."""
    rows = [r for r in found.rows if everything or not r.equal or not r.shapes_equal]
    if rows:
        columns = [
            Column("", [_sign(r) for r in rows]),
            Column("calls A", [_calls(r.a) for r in rows], right=True),
            Column("calls B", [_calls(r.b) for r in rows], right=True),
            Column("total A", [Text(duration(r.a.total_ns or None)) for r in rows], True, leaves=3),
            Column("total B", [Text(duration(r.b.total_ns or None)) for r in rows], True, leaves=3),
            Column("median A", [Text(duration(r.a.median_ns)) for r in rows], True, leaves=2),
            Column("median B", [Text(duration(r.b.median_ns)) for r in rows], True, leaves=2),
            Column("family", [Text(r.family, style="cyan") for r in rows], leaves=4),
            Column("kernel", [Text(r.short) for r in rows], flexible=True),
        ]
        console.print(table(columns, min(console.width, WIDEST)))
    a, b = (sum(side.calls for side in sides) for sides in _kernels(found))
    console.print(
        Text.assemble(("A ", "bold"), names[0]), Text.assemble(("B ", "bold"), names[1]), sep="\n"
    )
    same = sum(r.equal for r in found.rows if r.kind == "kernel")
    kinds = sum(r.kind == "kernel" for r in found.rows)
    if found.equal:
        order = {True: ", in the same order", False: ", in another order", None: ""}
        console.print(Text(
            f"✓ the same {kinds:,} kernels, equally often ({a:,} launches)"
            f"{order[found.same_order]}",
            style="green",
        ))  # fmt: skip
    else:
        console.print(Text(
            f"✗ {kinds - same:,} of {kinds:,} kernels are not launched equally often "
            f"({a:,} launches in A, {b:,} in B)", style="red",
        ))  # fmt: skip
    for loss in found.losses:
        console.print(Text(f"nsys reports a loss: {loss}", style="yellow"))


def print_summary(found: Summary, console: Console) -> None:
    """What a trace holds, and how much of it is attributed."""
    for facts in found.facts:
        version = f"nsys {facts.nsys}" if facts.nsys else "nsys of unknown version"
        schema = f"schema {facts.schema}" if facts.schema else "no schema version"
        mode = f"graphs traced by {facts.graph_mode}" if facts.graph_mode else "graph mode unknown"
        told = f"  {_times(facts.gpus) or 'GPU unknown'} · {version}, {schema} · {mode}"
        console.print(Text.assemble((str(facts.path), "bold"), told))
    lines = [
        ("ran", f"{found.kernels:,} kernels ({found.names:,} names), {found.copies:,} copies and "
                f"fills; streams: {found.streams:,}; from graphs: {found.from_graphs:,}"),
        ("time", f"{duration(found.gpu_ns)} of GPU time within {duration(found.span_ns)}; "
                 f"{_busy(found)}"),
        ("ranks", _ranks(found)),
        ("steps", f"{found.step_count:,} labelled; {_coverage(found.steps)}" if found.step_count
                  else "none labelled"),
        ("modules", f"{found.paths:,} in {found.ranges:,} ranges; {_coverage(found.modules)}"
                    if found.ranges else "no NVTX ranges"),
    ]  # fmt: skip
    for key, text in lines:
        console.print(Text.assemble((f"{key:<9}", "dim"), text))
    _warnings(found, console)
    columns = [
        Column(
            "share", [Text(f"{ns / max(found.gpu_ns, 1):.1%}") for _, ns, _ in found.families], True
        ),
        Column("total", [Text(duration(ns)) for _, ns, _ in found.families], True),
        Column("launches", [Text(f"{calls:,}") for *_, calls in found.families], True),
        Column("family", [Text(name, style="cyan") for name, *_ in found.families]),
    ]
    console.print()
    console.print(table(columns, min(console.width, WIDEST)))


def _warnings(found: Summary, console: Console) -> None:
    said = []
    if found.no_launch:
        said.append(f"{found.no_launch:,} executions have no launch in the export: they began "
                    "before the window, or their record was lost")  # fmt: skip
    if found.no_node:
        said.append(f"{found.no_node:,} replayed executions have no node creation in the export")
    for facts in found.facts:
        if facts.whole_graphs:
            said.append(_whole_graphs(facts.whole_graphs, facts.whole_graphs_ns))
        said += [f"nsys: {warning}" for warning in facts.warnings]
    if not found.one_clock:
        said.append("the files have no common clock: times of different ranks cannot be compared")
    for line in dict.fromkeys(said):
        console.print(Text(line, style="yellow"))


def _whole_graphs(launches: int, ns: int) -> str:
    return (
        f"{launches:,} graph launches ({duration(ns)}) were recorded whole: the kernels inside are "
        "not visible; record with --cuda-graph-trace=node"
    )


def _ranks(found: Summary) -> str:
    said = [
        f"{r.rank} (GPU {', '.join(map(str, r.devices))}, pid {r.process}, {r.kernels:,} kernels)"
        for r in found.ranks[:8]
    ]
    more = f" and {len(found.ranks) - 8} more" if len(found.ranks) > 8 else ""
    alike = "".join(
        f"; ranks {', '.join(map(str, group))} launch the same kernels" for group in found.alike
    )
    return ", ".join(said) + more + alike


def _coverage(found: Attributed) -> str:
    ways = {"thread": found.thread, "graph node": found.node, "other thread's time": found.time}
    said = [f"{ns / max(found.total, 1):.0%} by {way}" for way, ns in ways.items() if ns]
    return f"{found.share:.1%} of GPU time attributed" + (f" ({', '.join(said)})" if said else "")


def _busy(found: Summary) -> str:
    each = found.busy_ns / max(found.span_ns * len(found.ranks), 1)
    return (
        f"GPUs busy {each:.1%} of it" if len(found.ranks) > 1 else f"the GPU busy {each:.1%} of it"
    )


def _times(names: Sequence[str]) -> str:
    """Names, equal ones counted: ``2 × NVIDIA H100 80GB HBM3``."""
    return ", ".join(
        f"{names.count(name)} × {name}" if names.count(name) > 1 else name
        for name in dict.fromkeys(names)
    )


def _kernels(found: Diff) -> tuple[list[Side], list[Side]]:
    rows = [r for r in found.rows if r.kind == "kernel"]
    return [r.a for r in rows], [r.b for r in rows]


def _sign(row: Difference) -> Text:
    if row.kind != "kernel":
        return Text("·", style="dim")
    if row.equal:
        return Text(
            "=" if row.shapes_equal else "≈", style="green" if row.shapes_equal else "yellow"
        )
    if not row.a.calls:
        return Text("+", style="red")
    return Text("−" if not row.b.calls else "≠", style="red")


def _calls(side: Side) -> Text:
    return Text(f"{side.calls:,}") if side.calls else NOTHING


def _show(columns: list[Column], more: int, what: str, console: Console) -> None:
    console.print(table(columns, min(console.width, WIDEST)))
    if more:
        console.print(Text(f"… and {more:,} more {what}; --top 0 shows all", style="dim"))


def _lost(about: Row, console: Console) -> None:
    lost = about["unattributed"]
    words = {
        "launch": "kernels without a launch in the export",
        "graph_node": "kernels of graph nodes whose creation is not in the export",
        "name": "kernels without a name",
    }
    for key, text in words.items():
        if lost[key]:
            console.print(Text(f"{text}: {lost[key]:,}", style="yellow"))
    if lost["whole_graphs"]:
        said = _whole_graphs(lost["whole_graphs"], lost["whole_graphs_ns"])
        console.print(Text(said, style="yellow"))
    for loss in about["losses"]:
        console.print(Text(f"nsys reports a loss: {loss}", style="yellow"))


def _share(rows: Sequence[Row]) -> Column:
    return Column("share", [Text(f"{r['share']:.1%}") for r in rows], right=True)


def _time(title: str, rows: Sequence[Row], key: str, leaves: int = 0) -> Column:
    return Column(title, [Text(duration(r[key])) for r in rows], right=True, leaves=leaves)


def _count(title: str, rows: Sequence[Row], key: str, leaves: int = 0) -> Column:
    cells = [NOTHING if r[key] is None else Text(f"{r[key]:,}") for r in rows]
    return Column(title, cells, right=True, leaves=leaves)


def _part(some: int, whole: int) -> Text:
    return NOTHING if not some else Text("all" if some == whole else f"{some / whole:.0%}")


def _requests(row: Row, phase: str) -> Text:
    requests, tokens = row[f"{phase}_requests"], row[f"{phase}_tokens"]
    if not requests:
        return NOTHING
    return Text(f"{requests:,}" if tokens is None else f"{requests:,} ({tokens:,})")


def _ways(row: Row) -> Text:
    ways = (("launch", "by_thread"), ("node", "by_node"), ("time", "by_time"))
    return Text(", ".join(word for word, key in ways if row[key]) or "–", style="dim")


def _size(row: Row, what: str) -> Text:
    sizes = [row[f"{what}_{axis}"] for axis in "xyz"]
    return NOTHING if sizes[0] is None else Text(" × ".join(f"{size}" for size in sizes))


def _last(path: str) -> str:
    """The end of a path, as much as tells modules of one layer apart."""
    parts = path.split("/")[-1].split(".")
    return ".".join(parts[-3:])
