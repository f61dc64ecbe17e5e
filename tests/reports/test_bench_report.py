"""The benchmark's result as Markdown, CSV, JSON and JSON lines."""
# ruff: noqa: E501  # a whole table stands here as it is printed

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import fields, replace
from pathlib import Path

from opkit.bench.result import Bench, Context, Failure, Row
from opkit.reports.bench import render_bench

PROMPT = Row(
    model="dir/qwen3-4l", backend="vllm", engine_version="0.24.0", gpu="NVIDIA H100 80GB HBM3",
    test="pp512", test_type="prompt", n_prompt=512, n_gen=0, n_batch=1, n_tokens=512,
    repetitions=2, avg_ns=5_000_000, stddev_ns=141_421, avg_ts=102_441.0, stddev_ts=2897.5,
    samples_ns=(4_900_000, 5_100_000), data_file="out/pp512.json", ttft_avg_ns=4_950_000,
    ttft_stddev_ns=100_000, ttft_samples_ns=(4_850_000, 5_050_000), itl_avg_ns=None,
    itl_stddev_ns=None, itl_samples_ns=(), itl_p50_ns=None, itl_p99_ns=None, watts=612.34,
    joules_per_token=0.00598, power_method="energy counter", power_scope="whole board of GPU 0",
    power_ns=2_000_000_000, power_repetitions=400, temp_start_c=41, temp_max_c=48,
    clock_avg_mhz=1964.6, clock_min_mhz=1845, throttle=("SwPowerCap",), cached_tokens=0,
    warmups=61, started="2026-11-21T22:49:06Z", interrupted=False,
)  # fmt: skip
BARE = replace(
    PROMPT, test="tg8", test_type="generation", n_prompt=0, n_gen=8, n_tokens=8, repetitions=1,
    stddev_ns=None, avg_ts=700.5, stddev_ts=None, samples_ns=(11_420_000,), ttft_avg_ns=None,
    ttft_stddev_ns=None, ttft_samples_ns=(), itl_avg_ns=1_420_000, watts=None,
    joules_per_token=None, power_method="", power_scope="", power_ns=None, power_repetitions=None,
    temp_start_c=None, temp_max_c=None, clock_avg_mhz=None, clock_min_mhz=None, throttle=(),
    gpu="", notes=("the engine did not tell when the first token was there",),
)  # fmt: skip


def bench(*rows: Row) -> Bench:
    return Bench("0.1.0", "2026-11-21T22:49:00Z", "out", rows=list(rows))


def test_the_table() -> None:
    assert (
        render_bench(bench(PROMPT, BARE), "md")
        == """\
| model    | backend     | test  |              tokens/s |       TTFT ms | ITL ms | power W | J/token | max °C | clock MHz |
| -------- | ----------- | ----- | --------------------: | ------------: | -----: | ------: | ------: | -----: | --------: |
| qwen3-4l | vllm 0.24.0 | pp512 | 102,441.00 ± 2,897.50 | 4.950 ± 0.100 |      – |   612.3 |  0.0060 |     48 |     1,965 |
| qwen3-4l | vllm 0.24.0 | tg8   |                700.50 |             – |  1.420 |       – |       – |      – |         – |

GPU: NVIDIA H100 80GB HBM3.  
Power: whole board of GPU 0, by energy counter.  
tg8: the engine did not tell when the first token was there.  
pp512: clocks lowered by SwPowerCap.  
"""
    )


def test_a_server_is_named_before_its_version() -> None:
    """Of two servers of one model each by its own name."""
    rows = [
        replace(BARE, backend="openai-url", engine_version=version)
        for version in ("0.24.0", "0.5.14")
    ]
    found = bench(*rows)
    found.models = [
        Context(row.model, row.backend, row.engine_version, "", {"owned_by": name}, {}, {})
        for row, name in zip(rows, ("vllm", "sglang"), strict=True)
    ]
    text = render_bench(found, "md")
    assert re.findall(r"openai-url [^|]*[^| ]", text) == [
        "openai-url vllm 0.24.0", "openai-url sglang 0.5.14",
    ]  # fmt: skip


def test_no_power_is_said() -> None:
    assert "Power: not measured, since no sensors tell it here." in render_bench(bench(BARE), "md")


def test_what_failed_is_below_the_table() -> None:
    found = bench(BARE)
    found.failures.append(Failure("dir/m", "vllm", "pp512", "no memory"))
    found.failures.append(Failure("dir/m", "vllm", "", "no engine"))
    found.interrupted = True
    lines = [line.strip() for line in render_bench(found, "md").splitlines()]
    assert lines[-3:] == [
        "FAILED pp512: no memory", "FAILED dir/m: no engine",
        "Interrupted: this is what was measured until then.",
    ]  # fmt: skip


def test_nothing_measured_is_no_table() -> None:
    found = bench()
    found.failures.append(Failure("m", "vllm", "", "no engine"))
    assert render_bench(found, "md") == "FAILED m: no engine  \n"


def test_a_name_does_not_break_the_table() -> None:
    text = render_bench(bench(replace(BARE, model="a|b")), "md")
    assert r"| a\|b " in text


def test_json_is_the_whole_run() -> None:
    found = json.loads(render_bench(bench(PROMPT, BARE), "json"))
    assert found["schema"] == "opkit.bench/1"
    assert [row["test"] for row in found["results"]] == ["pp512", "tg8"]
    assert found["results"][0]["samples_ns"] == [4_900_000, 5_100_000]
    assert found["results"][1]["watts"] is None
    assert set(found) == {
        "schema", "opkit", "started", "folder", "interrupted", "models", "results", "failures",
    }  # fmt: skip


def test_json_lines_stand_alone() -> None:
    lines = render_bench(bench(PROMPT, BARE), "jsonl").splitlines()
    assert [json.loads(line)["test"] for line in lines] == ["pp512", "tg8"]
    assert {json.loads(line)["schema"] for line in lines} == {"opkit.bench/1"}


def test_csv_has_every_key() -> None:
    first, second = csv.DictReader(io.StringIO(render_bench(bench(PROMPT, BARE), "csv")))
    assert list(first) == [field.name for field in fields(Row)]
    assert json.loads(first["samples_ns"]) == [4_900_000, 5_100_000]
    assert (first["watts"], second["watts"]) == ("612.34", "")
    assert json.loads(first["interrupted"]) is False


def test_every_key_is_defined_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text("utf-8")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert [f.name for f in fields(Row) if not re.search(rf"`{f.name}`", tables)] == []
