"""What the tests of `opkit trace` share: recordings, and how the command is run."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Ran, run_main
from gpu_export import Export

TRACES = Path(__file__).parent / "traces"
RECORDED = Path(__file__).parents[1] / "opkit" / "recorded" / "dsa-vllm-h100-e2e.sqlite.gz"
PROCESS = TRACES / "h100-process-e2e.sqlite.gz"
TP2 = TRACES / "h200-tp2-e2e.sqlite.gz"
STEP = "execute_context_0(0)_generation_4(4)"
Trace = Callable[..., Ran]


@pytest.fixture
def trace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Trace:
    """``opkit trace WORDS``."""
    return lambda *words: run_main(capsys, monkeypatch, "trace", *words)


@pytest.fixture
def recording(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the recording that the test is parametrised with: its cache lies beside it."""
    return Path(shutil.copy(request.param, tmp_path))


def data(ran: Ran) -> Any:
    """The JSON of a run that succeeded."""
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def by_name(kernels: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {row["name"]: (row["calls"], row["total_ns"]) for row in kernels}


def whole_graph(path: Path) -> Path:
    """A kernel, and a graph of 5 µs recorded as one."""
    made = Export()
    made.launch("k", 100, 1_000)
    with closing(sqlite3.connect(made.write(path))) as db:
        db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_GRAPH_TRACE (start INTEGER, end INTEGER)")
        db.execute("INSERT INTO CUPTI_ACTIVITY_KIND_GRAPH_TRACE VALUES (2000, 7000)")
        db.commit()
    return path
