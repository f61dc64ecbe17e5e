"""The bundled recording judged once, a real verdict to admit collections with; made tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_rows import about, grid

from opkit.align.judge import Question, judge
from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult
from opkit.collect.tables.write import write_tables
from opkit.layers.dsa import DSA

RECORDED = Path(__file__).parents[2] / "opkit" / "recorded"


@pytest.fixture(scope="session")
def aligned() -> AlignResult:
    """The verdict on the bundled H100 recording: pass, in both phases."""
    mock = RECORDED / "dsa-vllm-h100-mock.sqlite.gz"
    engine = RECORDED / "dsa-vllm-h100-e2e.sqlite.gz"
    return judge(Question(DSA, mock, (engine,), "vllm"))


@pytest.fixture
def ledger(tmp_path: Path, aligned: AlignResult) -> Ledger:
    """A ledger that holds that verdict."""
    made = Ledger(tmp_path / "ledger.db")
    made.record(aligned)
    return made


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Both DSA tables of a made collection."""
    write_tables(DSA, grid(), about(), tmp_path / "tables")
    return tmp_path / "tables"
