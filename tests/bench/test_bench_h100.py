"""What holds of every benchmark, held of two that ran on an H100: sums, times, units, files."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from h100_bench import DETAILS, FOLDER, RUNS, load, made_again, results

from opkit.bench.files import DETAIL_SCHEMA
from opkit.bench.read import bench_from_json
from opkit.reports.bench import render_bench

ROWS = [pytest.param(row, id=f"{run}-{test}") for run in RUNS for test, row in results(run).items()]
S = 1e9


def close(value: float, within: float = 1e-9) -> Any:
    return pytest.approx(value, rel=within)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_whole(run: str) -> None:
    found = load(run)
    assert (found["failures"], found["interrupted"]) == ([], False)
    asked = found["models"][0]["options"]
    tests = [f"pp{n}" for n in asked["n_prompt"]] + [f"tg{n}" for n in asked["n_gen"]]
    tests += [f"pp{prompt}+tg{gen}" for prompt, gen in asked["pairs"]]
    assert list(results(run)) == tests
    assert {row["repetitions"] for row in found["results"]} == {asked["repetitions"]}
    assert all(row["started"] > found["started"] for row in found["results"])
    assert sorted(row["started"] for row in found["results"]) == [
        row["started"] for row in found["results"]
    ]


@pytest.mark.parametrize("run", RUNS)
def test_it_is_read_back_and_written_alike(run: str) -> None:
    found = load(run)
    bench = bench_from_json(found, run)
    again = json.loads(render_bench(bench, "json"))
    for row in again["results"]:
        assert row.pop("power_ts") is None  # a key that this opkit did not write yet
    assert again == found


@pytest.mark.parametrize("row", ROWS)
def test_speed_and_its_spread_are_those_of_the_samples(row: dict[str, Any]) -> None:
    samples = row["samples_ns"]
    speeds = [row["n_tokens"] * S / sample for sample in samples]
    assert len(samples) == row["repetitions"]
    assert row["n_tokens"] == row["n_batch"] * (row["n_prompt"] + row["n_gen"])
    assert row["avg_ns"] == round(statistics.fmean(samples))
    assert row["stddev_ns"] == round(statistics.stdev(samples))
    assert row["avg_ts"] == close(statistics.fmean(speeds))
    assert row["stddev_ts"] == close(statistics.stdev(speeds))
    assert min(speeds) <= row["avg_ts"] <= max(speeds)


@pytest.mark.parametrize("row", ROWS)
def test_first_token_and_later_ones_make_the_whole(row: dict[str, Any]) -> None:
    """What is left after the last token is the way back of the answer, under 2 ms; of a server
    nothing, since its sample ends with the last token."""
    later = max(0, row["n_gen"] - 1)
    between = row["itl_samples_ns"] or [0] * row["repetitions"]
    assert bool(row["itl_samples_ns"]) == (later > 0)
    for sample, first, gap in zip(row["samples_ns"], row["ttft_samples_ns"], between, strict=True):
        left = sample - first - gap * later
        if row["backend"] == "openai-url":
            assert abs(left) <= later  # a gap is rounded to 1 ns
        else:
            assert 0 < left < 2_000_000
    for kind in ("ttft", "itl"):
        if values := row[f"{kind}_samples_ns"]:
            assert row[f"{kind}_avg_ns"] == close(statistics.fmean(values), 1e-6)
            assert row[f"{kind}_stddev_ns"] == close(statistics.stdev(values), 1e-4)


@pytest.mark.parametrize("row", ROWS)
def test_percentiles_are_known_where_single_tokens_are(row: dict[str, Any]) -> None:
    seen = row["backend"] == "openai-url" and row["n_gen"] > 1
    assert (row["itl_p50_ns"] is not None) == (row["itl_p99_ns"] is not None) == seen
    if seen:
        assert row["itl_p50_ns"] == close(row["itl_avg_ns"], 0.1)
        assert row["itl_p50_ns"] < row["itl_p99_ns"]


@pytest.mark.parametrize("row", ROWS)
def test_joules_are_watts_by_time_over_tokens(row: dict[str, Any]) -> None:
    tokens = row["n_tokens"] * row["power_repetitions"]
    assert row["joules_per_token"] * tokens == close(row["watts"] * row["power_ns"] / S)
    assert row["power_ns"] >= 2.0 * S  # --power-seconds
    assert row["power_ns"] >= sum(row["samples_ns"])
    assert row["power_repetitions"] >= row["repetitions"]
    assert 70 < row["watts"] <= 700  # between an idle H100 and its limit
    assert row["clock_min_mhz"] <= row["clock_avg_mhz"] <= 1980
    assert 20 < row["temp_start_c"] <= row["temp_max_c"] < 90


def test_longer_prompts_draw_more_power_and_two_ways_agree() -> None:
    """The same engine on the same GPU: what it decodes does not depend on who asks."""
    offline, url = results("offline"), results("url")
    for run in (offline, url):
        assert run["pp512"]["watts"] < run["pp1024"]["watts"]
        assert run["pp512"]["ttft_avg_ns"] < run["pp1024"]["ttft_avg_ns"]
    for test in offline:
        assert offline[test]["ttft_avg_ns"] < url[test]["ttft_avg_ns"]  # HTTP takes its time
        if offline[test]["n_gen"]:
            assert url[test]["itl_avg_ns"] == close(offline[test]["itl_avg_ns"], 0.05)
            assert url[test]["joules_per_token"] == close(offline[test]["joules_per_token"], 0.02)


@pytest.mark.parametrize("name", DETAILS)
def test_a_detail_file_is_consistent(name: str) -> None:
    found = load(name)
    run, test = DETAILS[name]
    row = results(run)[test]
    assert (found["schema"], found["test"]) == (DETAIL_SCHEMA, test)
    for kind, unit in (("power", "W"), ("temp", "°C"), ("freq", "MHz"), ("meter", "J")):
        series = found[kind]
        assert series["unit"] == unit
        lists = series["value"].values() if kind != "meter" else [series["value"]]
        assert {len(values) for values in lists} == {len(series["timestamps"])}
        assert all(a < b for a, b in pairwise(series["timestamps"]))
    joules = found["meter"]["value"]
    assert all(a <= b for a, b in pairwise(joules))
    looks = [b - a for a, b in pairwise(found["power"]["timestamps"])]
    assert statistics.median(looks) == close(found["power"]["sampling_duration_ms"] * 1e6, 0.02)
    begun = datetime.fromtimestamp(found["time"][0]["start_time_ns"] // 10**9, UTC)
    assert begun.isoformat().replace("+00:00", "Z") == row["started"]


@pytest.mark.parametrize("name", DETAILS)
def test_a_detail_file_holds_every_run(name: str) -> None:
    found = load(name)
    run, test = DETAILS[name]
    row = results(run)[test]
    runs = found["time"]
    numbers = [each["rep_id"] for each in runs]
    assert len(runs) == row["power_repetitions"]
    assert numbers == [*range(row["repetitions"])] + [-1] * (len(runs) - row["repetitions"])
    for each in runs:
        marks = [each["start_time_ns"], *each["first_token_ns"], *each["last_token_ns"]]
        assert marks == sorted(marks)
        assert marks[-1] <= each["end_time_ns"]
        assert each["tokens"] == [max(1, row["n_gen"])]
    assert all(a["end_time_ns"] < b["start_time_ns"] for a, b in pairwise(runs))
    began, ended = runs[0]["start_time_ns"], runs[-1]["end_time_ns"]
    assert ended - began == row["power_ns"]
    looks, meter = found["power"]["timestamps"], found["meter"]["timestamps"]
    assert looks[0] < began
    assert meter[0] < began + 20_000_000  # its first reading
    assert ended < min(looks[-1], meter[-1])
    levels = found["power"]["value"]["GPU 0"]
    assert row["watts"] == close(statistics.fmean(levels), 0.1)  # by another sensor


# Of these the detail tells nothing, or the stand-in for the sensors says something else.
NOT_TOLD = {"itl_p50_ns", "itl_p99_ns", "cached_tokens", "gpu", "backend", "notes", "power_ts"}


@pytest.mark.parametrize("name", DETAILS)
def test_today_s_opkit_makes_the_same_row_of_the_recorded_runs(name: str) -> None:
    made, then = made_again(name)
    now = json.loads(json.dumps(asdict(made)))
    # Then what was read just before the first repetition was left out.
    assert now.pop("temp_start_c") == load(name)["temp"]["value"]["GPU 0"][0]
    assert now.pop("temp_max_c") == max(load(name)["temp"]["value"]["GPU 0"][:-1])
    for key in ("watts", "joules_per_token"):  # seconds since 1970 have 0.2 us as a float
        assert now.pop(key) == close(then[key], 1e-6)
    for key, value in now.items():
        if key not in NOT_TOLD:
            assert (key, value) == (key, then[key])


def test_the_runs_for_power_were_slower_and_that_is_told_now() -> None:
    made, then = made_again("offline_pp512")
    assert made.watts is not None
    assert made.power_ts is not None
    assert made.joules_per_token == close(made.watts / made.power_ts)
    assert made.power_ts < 0.9 * then["avg_ts"]
    assert [note.split(" runs at")[0] for note in made.notes] == ["power is of 227"]
    assert made_again("offline_tg128")[0].notes == ()


@pytest.mark.parametrize("run", RUNS)
def test_the_documents_show_what_was_written(run: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text("utf-8")
    shown = render_bench(bench_from_json(load(run), run), "md").splitlines()
    table = [line for line in shown if line.startswith("|")]
    assert len(table) == 2 + len(load(run)["results"])
    assert "\n".join(table) in page


def test_the_excerpt_in_the_documents_is_one_test_of_the_recording() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bench.md").read_text("utf-8")
    text = page[page.index("```json") + len("```json") :]
    excerpt = json.loads(text[: text.index("```")])
    row = results("url")[excerpt["test"]]
    assert {key: row[key] for key in excerpt} == excerpt
    assert len(excerpt) > 15


def test_recordings_are_small_and_tell_of_no_machine() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 60_000
    for name in (*RUNS, *DETAILS):
        text = json.dumps(load(name))
        assert not [word for word in ("/tmp", "/opt", "/home", "/root") if word in text]
