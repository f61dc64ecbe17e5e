"""`opkit trace` as a user meets it: what it prints, writes, refuses, and its exit codes."""

from __future__ import annotations

import csv
import io
import subprocess
from pathlib import Path

import duckdb
import pytest
from cli_runs import PROGRAM, environment
from gpu_export import Export, module
from made_export import make_export
from trace_runs import PROCESS, RECORDED, TP2, TRACES, Trace, data, whole_graph

from opkit.align.regions import mark_layers, read_steps
from opkit.align.shapes import read_labels
from opkit.errors import EXIT_BAD_INPUT
from opkit.layers.dsa import DSA
from opkit.nsys_parsers.ranges import STEP_SQL
from opkit.nsys_parsers.trace import open_trace

# --- kernels


@pytest.mark.parametrize("recording", [RECORDED], indirect=True)
def test_kernels_are_those_of_nsys_stats_in_every_column(recording: Path, trace: Trace) -> None:
    found = data(trace("kernels", recording, "--json"))
    assert found["schema"] == "opkit.trace.kernels/1"
    rows = {row["name"]: row for row in found["kernels"]}
    text = (TRACES / "nsys-stats-e2e.csv").read_text("utf-8")
    wanted = list(csv.DictReader(io.StringIO(text[text.index("Time (%),") :])))
    assert len(wanted) == len(rows) > 100
    for want in wanted:
        row = rows[want["Name"]]
        assert row["calls"] == int(want["Instances"])
        for key, column in {
            "total_ns": "Total Time (ns)", "min_ns": "Min (ns)", "max_ns": "Max (ns)",
        }.items():  # fmt: skip
            assert row[key] == int(want[column])
        for key, column in {
            "mean_ns": "Avg (ns)", "median_ns": "Med (ns)", "stddev_ns": "StdDev (ns)",
        }.items():  # fmt: skip
            assert row[key] == pytest.approx(float(want[column]), abs=0.051)
        assert 100 * row["share"] == pytest.approx(float(want["Time (%)"]), abs=0.051)


@pytest.mark.parametrize("recording", [PROCESS], indirect=True)
def test_the_quick_answer_is_that_of_the_table(recording: Path, trace: Trace) -> None:
    quick = data(trace("kernels", recording, "--json"))
    whole = data(trace("kernels", recording, "--json", "--rank", 0))
    assert len(quick["kernels"]) == 181
    assert quick == whole


def test_kernels_by_another_name_add_up(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    for tile in ("64x32", "128x64"):
        made.launch(f"nvjet_sm90_tst_{tile}_64x4_1x2_h_bz_TNN", 100, 1_000, ns=300)
    made.launch("[memset]", 200, 2_000, ns=50)
    path = made.write(tmp_path / "made.sqlite")
    assert [r["calls"] for r in data(trace("kernels", path, "--json"))["kernels"]] == [1, 1]
    (family,) = data(trace("kernels", path, "--json", "--by", "family"))["kernels"]
    assert (family["name"], family["calls"], family["names"]) == ("nvjet", 2, 2)
    assert (family["share"], family["stddev_ns"]) == (1.0, 0)
    rows = data(trace("kernels", path, "--json", "--copies"))["kernels"]
    assert [(r["name"], r["total_ns"]) for r in rows][-1] == ("[memset]", 50)


def test_what_is_not_attributed_is_counted(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    made.launch("seen", 100, 1_000)
    made.kernel("began before the window", 2_000, made.correlation())
    made.launch("of an unknown node", 300, 3_000, node=7)
    made.add("DIAGNOSTIC_EVENT", text="CUPTI buffer full: 12 records dropped")
    path = made.write(tmp_path / "made.sqlite")
    found = data(trace("kernels", path, "--json"))
    assert found["unattributed"] == {
        "launch": 1, "graph_node": 1, "name": 0, "whole_graphs": 0, "whole_graphs_ns": 0,
    }  # fmt: skip
    assert found["losses"] == ["CUPTI buffer full: 12 records dropped"]
    shown = trace("kernels", path)
    assert "kernels without a launch in the export: 1" in shown.out
    assert "nsys reports a loss: CUPTI buffer full" in shown.out


def test_kernels_inside_whole_graphs_are_said_to_be_invisible(tmp_path: Path, trace: Trace) -> None:
    path = whole_graph(tmp_path / "made.sqlite")
    for name in ("kernels", "summary"):
        out = " ".join(trace(name, path).out.split())
        assert "1 graph launches (5 µs) were recorded whole: the kernels inside are not" in out
        assert "--cuda-graph-trace=node" in out


# --- the cache


def test_a_cache_is_kept_beside_the_export_unless_refused(tmp_path: Path, trace: Trace) -> None:
    path = make_export(tmp_path / "made.sqlite")
    folder = tmp_path / "made.sqlite.opkit"
    first = trace("modules", path, "--json", "--no-cache").out
    assert not folder.exists()
    assert trace("modules", path, "--json").out == first
    made = sorted(folder.iterdir())
    assert len(made) == 1
    before = (made[0] / "kernel.parquet").stat().st_mtime_ns
    assert trace("modules", path, "--json").out == first
    assert (made[0] / "kernel.parquet").stat().st_mtime_ns == before


# --- forms


@pytest.mark.parametrize("recording", [TP2], indirect=True)
def test_csv_parquet_and_json_hold_the_same(recording: Path, tmp_path: Path, trace: Trace) -> None:
    rows = data(trace("steps", recording, "--json"))["steps"]
    parquet = tmp_path / "steps.parquet"
    text = trace("steps", recording, "--csv", "--parquet", parquet).out
    listed = list(csv.DictReader(io.StringIO(text)))
    assert [int(r["step"]) for r in listed] == [r["step"] for r in rows]
    assert [r["label"] for r in listed] == [r["label"] for r in rows]
    read = duckdb.sql(f"SELECT step, gpu_ns FROM '{parquet}' ORDER BY step").fetchall()
    assert read == [(r["step"], r["gpu_ns"]) for r in rows]
    assert not list(tmp_path.glob("*.part"))
    top = data(trace("steps", recording, "--json", "--top", 2))["steps"]
    assert top == rows[:2]


def test_a_report_says_how_much_it_leaves_out(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    for number in range(50):
        made.launch(f"kernel_{number}", 100 * number, 1_000 * number)
    path = made.write(tmp_path / "made.sqlite")
    assert "… and 10 more kernel names; --top 0 shows all" in trace("kernels", path).out
    everything = trace("kernels", path, "--top", 0).out
    assert "more kernel names" not in everything
    assert all(f"kernel_{number}" in everything for number in range(50))


def test_a_reader_who_leaves_changes_nothing(tmp_path: Path) -> None:
    line = f"{' '.join(PROGRAM)} trace sequence --all --json {PROCESS} --no-cache"
    script = f"{line} | head -c 100; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment(), cwd=tmp_path,
        timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout[100:] == "0\n"  # the exit code, after all that the reader took
    assert done.stdout.startswith('{"schema": "opkit.trace.sequence/1"')
    assert done.stderr == ""


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path, trace: Trace) -> None:
    path = make_export(tmp_path / "made.sqlite")
    ran = trace("kernels", path, "--parquet", tmp_path / "no" / "such" / "folder.parquet")
    assert ran.code == EXIT_BAD_INPUT
    assert "folder.parquet" in ran.complaint()


# --- steps and modules


@pytest.mark.parametrize("recording", [TP2], indirect=True)
def test_ranks_of_one_trace_step_together(recording: Path, trace: Trace) -> None:
    found = data(trace("steps", recording, "--json"))
    assert (found["steps_by"], found["ranks_together"]) == ("label", True)
    rows = found["steps"]
    assert {row["ranks"] for row in rows} == {2}
    prefill = next(row for row in rows if row["context_tokens"] == 2048)
    assert (prefill["context_requests"], prefill["generation_requests"]) == (1, 0)
    assert prefill["launches"] == prefill["least_launches"] > 100
    each = data(trace("steps", recording, "--json", "--per-rank"))["steps"]
    assert len(each) == 2 * len(rows)
    assert max(r["gpu_ns"] for r in each if r["step"] == prefill["step"]) == prefill["gpu_ns"]


def test_without_labels_graph_launches_or_pauses_are_steps(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    for number in range(3):
        correlation = made.correlation()
        made.call(10_000 * number, correlation)
        for node in (1, 2):
            made.kernel("k", 10_000 * number + 100 * node, correlation, ns=90, node=node)
    path = made.write(tmp_path / "made.sqlite")
    found = data(trace("steps", path, "--json"))
    assert found["steps_by"] == "graph launch"
    assert [(row["step"], row["launches"]) for row in found["steps"]] == [(0, 2), (1, 2), (2, 2)]
    found = data(trace("steps", path, "--json", "--gap-us", 5))
    assert [(row["launches"], row["span_ns"]) for row in found["steps"]] == [(2, 190)] * 3
    (row,) = data(trace("steps", path, "--json", "--gap-us", 20))["steps"]
    assert row["launches"] == 6


def test_a_pattern_names_the_ranges_that_are_steps(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    for number in range(2):
        made.range(f"iteration {number}", 1_000 * number, 1_000 * number + 900)
        made.launch("k", 1_000 * number + 10, 5_000 + 1_000 * number)
    path = made.write(tmp_path / "made.sqlite")
    rows = data(trace("steps", path, "--json", "--step-pattern", "^iteration"))["steps"]
    assert [(r["label"], r["launches"]) for r in rows] == [("iteration 0", 1), ("iteration 1", 1)]
    bad = trace("steps", path, "--step-pattern", "(")
    assert bad.code == EXIT_BAD_INPUT
    assert "no regular expression" in bad.complaint()


def test_modules_hold_what_lies_below_them(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    for layer in (0, 1):
        at = 10_000 * layer
        made.range(module(f"layers.{layer}"), at, at + 9_000)
        made.range(module(f"layers.{layer}.attn"), at + 100, at + 500)
        made.launch("k", at + 200, 50_000 + at, ns=30)
        made.launch("own", at + 600, 52_000 + at, ns=5)
    made.launch("outside", 90_000, 95_000, ns=7)
    path = made.write(tmp_path / "made.sqlite")
    found = data(trace("modules", path, "--json"))
    times = {r["path"]: (r["total_ns"], r["self_ns"], r["calls"]) for r in found["modules"]}
    assert times == {
        "layers.0": (35, 5, 2), "layers.0.attn": (30, 30, 1), "layers.1": (35, 5, 2),
        "layers.1.attn": (30, 30, 1), "": (7, 7, 1),
    }  # fmt: skip
    assert found["unattributed"] == {"executions": 1, "ns": 7}
    folded = data(trace("modules", path, "--json", "--fold"))["modules"]
    assert [(r["path"], r["total_ns"], r["self_ns"]) for r in folded] == [
        ("layers.*", 70, 10), ("layers.*.attn", 60, 60), ("", 7, 7),
    ]  # fmt: skip
    shallow = data(trace("modules", path, "--json", "--depth", 2))["modules"]
    assert {r["path"] for r in shallow} == {"layers.0", "layers.1", ""}
    assert "(in no range)" in trace("modules", path).out


# --- sequence


@pytest.mark.parametrize("recording", [PROCESS], indirect=True)
def test_a_sequence_is_one_region_in_capture_order(recording: Path, trace: Trace) -> None:
    label = r"^execute_context_0\(0\)_generation_1\(1\)$"
    found = data(
        trace("sequence", recording, "--json", "--step", label, "--module", "layers.2.self_attn")
    )
    rows = found["sequence"]
    assert found["regions"] > 1
    assert len({row["step"] for row in rows}) == 1
    assert {row["mode"] for row in rows} == {"graph"}
    assert {row["module_by"] for row in rows} == {"node"}
    assert [row["node_ns"] for row in rows] == sorted(row["node_ns"] for row in rows)
    assert [row["position"] for row in rows] == list(range(len(rows)))
    assert [row["name"] for row in rows] == aligned_names(recording, rows[0]["step"])


def aligned_names(recording: Path, number: int) -> list[str]:
    """The same region as alignment finds it, by a way of its own: layer 2 of that step."""
    with open_trace(recording) as opened:
        labels = opened.rows(
            f"SELECT id FROM nvtx WHERE regexp_matches(text, '{STEP_SQL}') ORDER BY start"
        )
        step = labels[number][0]
        read_labels(opened)
        mark_layers(opened, DSA.region["vllm"])
        found = read_steps(opened, [step])[step]
    layers = zip(found.launches, found.layers, strict=True)
    return [launch.name.demangled for launch, layer in layers if layer == 2]


def test_without_steps_the_first_pass_through_a_module_is_a_region(
    tmp_path: Path, trace: Trace
) -> None:
    made = Export()
    for turn in range(3):
        at = 1_000 * turn
        made.range("block", at, at + 500)
        made.range("inner", at + 10, at + 100)
        made.launch(f"a{turn}", at + 20, 9_000 + at)
        made.launch(f"b{turn}", at + 200, 9_100 + at)
    path = made.write(tmp_path / "made.sqlite")
    found = data(trace("sequence", path, "--json", "--module", "block"))
    assert [row["name"] for row in found["sequence"]] == ["a0", "b0"]
    assert found["regions"] == 3
    every = data(trace("sequence", path, "--json", "--module", "block", "--all"))["sequence"]
    assert len(every) == 6
    none = trace("sequence", path, "--module", "nothing like it")
    assert none.code == EXIT_BAD_INPUT
    assert "nothing was launched in module nothing like it" in none.complaint()
