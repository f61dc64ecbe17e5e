"""`opkit trace diff`, ranks of one run, and what every question refuses."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import command, environment
from gpu_export import Export
from made_export import OTHER_PID, make_export
from trace_runs import STEP, TP2, TRACES, Trace, by_name, data, whole_graph

from opkit.errors import EXIT_BAD_INPUT

# --- diff


def test_a_trace_launches_what_it_launches(tmp_path: Path, trace: Trace) -> None:
    path = make_export(tmp_path / "made.sqlite")
    ran = trace("diff", path, path, "--json")
    found = data(ran)
    assert found["schema"] == "opkit.trace.diff/1"
    assert (found["equal"], found["same_order"]) == (True, True)
    assert "✓ the same 3 kernels, equally often" in trace("diff", path, path).out


def test_another_count_or_another_name_is_a_difference(tmp_path: Path, trace: Trace) -> None:
    first, second = Export(), Export()
    for made in (first, second):
        made.launch("both", 100, 1_000)
        made.launch("[memset]", 200, 2_000)
    second.launch("both", 300, 3_000)
    second.launch("only there", 400, 4_000)
    a, b = first.write(tmp_path / "a.sqlite"), second.write(tmp_path / "b.sqlite")
    ran = trace("diff", a, b, "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert (found["equal"], found["same_order"]) == (False, False)
    calls = {r["name"]: (r["a"]["calls"], r["b"]["calls"], r["equal"]) for r in found["kernels"]}
    assert calls == {"both": (1, 2, False), "only there": (0, 1, False), "[memset]": (1, 1, True)}
    shown = trace("diff", a, b)
    assert shown.code == 1
    assert "✗ 2 of 2 kernels are not launched equally often (1 launches in A, 3 in B)" in shown.out


def test_copies_alone_make_no_difference_and_order_is_told(tmp_path: Path, trace: Trace) -> None:
    first, second = Export(), Export()
    for made, order in ((first, "xy"), (second, "yx")):
        for position, name in enumerate(order):
            made.launch(name, 100 * position, 1_000 * (position + 1))
    second.launch("[memset]", 500, 5_000)
    a, b = first.write(tmp_path / "a.sqlite"), second.write(tmp_path / "b.sqlite")
    found = data(trace("diff", a, b, "--json"))
    assert (found["equal"], found["same_order"]) == (True, False)
    assert "in another order" in trace("diff", a, b).out


@pytest.mark.parametrize("recording", [TP2], indirect=True)
def test_two_regions_of_one_trace_are_compared(recording: Path, trace: Trace) -> None:
    steps = data(trace("steps", recording, "--json"))["steps"]
    decode = [row["step"] for row in steps if row["label"] == STEP][:2]
    equal = trace("diff", recording, recording, "--step-a", decode[0], "--step-b", decode[1])
    assert equal.code == 0, equal.out
    prefill = next(row["step"] for row in steps if row["context_tokens"] == 2048)
    other = trace("diff", recording, recording, "--step-a", decode[0], "--step-b", prefill)
    assert other.code == 1
    ranks = trace("diff", recording, recording, "--rank-a", 0, "--rank-b", 1, "--step", prefill)
    assert ranks.code == 0, ranks.out


def test_graphs_whose_kernels_are_invisible_are_not_compared(tmp_path: Path, trace: Trace) -> None:
    path = whole_graph(tmp_path / "made.sqlite")
    ran = trace("diff", path, path)
    assert ran.code == EXIT_BAD_INPUT
    assert "not visible, so they cannot be compared" in ran.complaint()


# --- ranks and bad input


def test_ranks_of_one_run_are_one_table(tmp_path: Path, trace: Trace) -> None:
    files = [shutil.copy(TRACES / f"h200-rank{rank}.sqlite.gz", tmp_path) for rank in (1, 0)]
    found = data(trace("summary", *files, "--json"))
    assert found["alike"] == [[0, 1]]
    assert found["one_clock"] is True
    assert [(r["rank"], r["devices"], r["kernels"]) for r in found["ranks"]] == [
        (0, [0], 173), (1, [1], 173),
    ]  # fmt: skip
    assert found["step_count"] == 10
    one = by_name(data(trace("kernels", files[0], "--json"))["kernels"])
    both = by_name(data(trace("kernels", *files, "--json"))["kernels"])
    assert {name: calls for name, (calls, _) in both.items()} == {
        name: 2 * calls for name, (calls, _) in one.items()
    }
    rank = by_name(data(trace("kernels", *files, "--json", "--rank", 1))["kernels"])
    assert rank == one


def test_a_missing_rank_is_an_error(tmp_path: Path, trace: Trace) -> None:
    files = [
        shutil.copy(TRACES / f"h200-rank{rank}.sqlite.gz", tmp_path / f"rank{2 * rank}.sqlite.gz")
        for rank in (0, 1)
    ]
    ran = trace("summary", *files)
    assert ran.code == EXIT_BAD_INPUT
    assert "rank 1 is missing" in ran.complaint()
    assert trace("summary", *files, "--partial").code == 0


def test_processes_of_one_file_are_ranks(tmp_path: Path, trace: Trace) -> None:
    made = Export()
    made.launch("k", 100, 1_000)
    made.launch("k", 200, 2_000, tid=OTHER_PID + 5)
    path = made.write(tmp_path / "made.sqlite")
    assert [r["rank"] for r in data(trace("summary", path, "--json"))["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["kernels", "{}", "--rank", "7"], "there is no rank 7"),
        (["steps", "{}", "--step", "99"], "no step has the number 99"),
        (["modules", "{}", "--module", "("], "no regular expression"),
        (["summary", "{}", "--memory", "much"], "no amount of memory"),
        (["summary", "{}", "{}"], "given twice"),
        (["kernels", "{}.not"], "no such file"),
        (["kernels", "{}", "--families", "{}"], "not a readable families file"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, trace: Trace
) -> None:
    path = make_export(tmp_path / "made.sqlite")
    ran = trace(*(word.format(path) for word in words))
    assert ran.code == EXIT_BAD_INPUT
    assert sentence in ran.complaint()


def test_a_file_that_is_no_export_is_refused_by_every_question(
    tmp_path: Path, trace: Trace
) -> None:
    path = tmp_path / "notes.sqlite"
    path.write_bytes(gzip.compress(b"not a database"))
    for name in ("summary", "kernels", "steps", "modules", "sequence"):
        ran = trace(name, path)
        assert ran.code == EXIT_BAD_INPUT
        assert "not an SQLite file" in ran.complaint()
    assert not (tmp_path / "notes.sqlite.opkit").exists()


def test_every_command_of_trace_says_what_it_does() -> None:
    group = command("trace")
    assert set(group.commands) == {  # type: ignore[attr-defined]
        "summary", "kernels", "steps", "modules", "sequence", "diff", "slim",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "opkit", "trace", "--help"],
        capture_output=True, text=True, env=environment(), check=True, timeout=60,
    )  # fmt: skip
    assert all(name in done.stdout for name in ("kernels", "diff", "slim"))
