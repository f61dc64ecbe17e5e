"""The bundled recording judged once: a real verdict to admit collections with."""

from __future__ import annotations

from pathlib import Path

import pytest

from opkit.align.judge import Question, judge
from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult
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
