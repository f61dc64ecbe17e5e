"""What `opkit bench` wrote on an H100, read back, and its runs made anew from the detail files.

NVIDIA H100 80GB HBM3, driver 580.159.04, vLLM 0.24.0, torch 2.11.0+cu130, 2026-11-22; a model of
Qwen3-32B's shape with 4 layers and weights made up. The command was::

    opkit bench --backend vllm --model qwen3 --name qwen3-32b-4layers -p 512 1024 -n 128 256 \
        -pg 512,128 -r 10 -o json --engine-args load_format=dummy max_model_len=8192 \
        gpu_memory_utilization=0.7 compilation_config={"mode":0,"cudagraph_mode":\
"FULL_DECODE_ONLY","cudagraph_capture_sizes":[1,4,16]}

and the same with ``--backend openai-url`` against ``vllm serve`` of that model. Kept are both
summaries and three detail files. As written, but for folders of that machine (now relative) and the
GPU's UUID (now zeros).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from bench_world import FakeSensors, options

from opkit.bench.backends.backend import Reply, Served, Turn
from opkit.bench.measure import Measured
from opkit.bench.plan import BenchTest, Kind
from opkit.bench.recorder import Track
from opkit.bench.result import Row, make_row
from opkit.sensors.levels import Levels

FOLDER = Path(__file__).with_name("h100")
RUNS = ("offline", "url")
# Detail file → its run and test.
DETAILS = {
    "offline_pp512": ("offline", "pp512"),
    "offline_tg128": ("offline", "tg128"),
    "url_tg128": ("url", "tg128"),
}


def load(name: str) -> dict[str, Any]:
    """A file of :data:`FOLDER`, by its name without endings."""
    found: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return found


def results(name: str) -> dict[str, dict[str, Any]]:
    """Test → result, of a run."""
    return {each["test"]: each for each in load(name)["results"]}


def made_again(detail: str) -> tuple[Row, dict[str, Any]]:
    """The row that opkit makes today of a recorded detail, and the one that it made then.

    The detail does not tell single tokens, so the row has no percentiles.
    """
    found = load(detail)
    run, test = DETAILS[detail]
    then = results(run)[test]
    turns = {True: list[Turn](), False: list[Turn]()}
    for each in found["time"]:
        asked = zip(each["first_token_ns"], each["last_token_ns"], each["tokens"], strict=True)
        replies = tuple(Reply(first, last, tokens) for first, last, tokens in asked)
        turn = Turn(each["start_time_ns"], each["end_time_ns"], replies)
        turns[each["rep_id"] >= 0].append(turn)
    kinds = [found[kind]["value"] for kind in ("power", "temp", "freq")]
    levels = [
        (at, Levels(*({name: values[n] for name, values in kind.items()} for kind in kinds)))
        for n, at in enumerate(found["power"]["timestamps"])
    ]
    meter = zip(found["meter"]["timestamps"], found["meter"]["value"], strict=True)
    measured = Measured(
        BenchTest(Kind(then["test_type"]), then["n_prompt"], then["n_gen"]),
        turns=turns[True],
        more=turns[False],
        warmups=then["warmups"],
        track=Track(levels, [(at / 1e9, value) for at, value in meter]),
    )
    served = Served("qwen3", then["engine_version"])
    asked_for = options(name=then["model"], backend="vllm")
    return make_row(measured, asked_for, served, FakeSensors(), then["data_file"]), then
