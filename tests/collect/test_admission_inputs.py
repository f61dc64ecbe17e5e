"""Admission looks at how the aligned mock's activations were made: rows are always the prompts'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult
from opkit.collect.admission import ask_ledger
from opkit.errors import Refused
from opkit.layers.dsa import DSA
from opkit.layers.moe import MOE

BOTH = ("context", "generation")
H100 = "NVIDIA H100 80GB HBM3"


def fed(aligned: AlignResult, inputs: str) -> AlignResult:
    recipe = {**aligned.provenance["recipe"], "inputs": inputs}
    return dataclasses.replace(aligned, provenance={**aligned.provenance, "recipe": recipe})


@pytest.mark.parametrize("inputs", ["normal", "captured"])
def test_a_verdict_on_other_inputs_does_not_admit(
    tmp_path: Path, aligned: AlignResult, inputs: str
) -> None:
    ledger = Ledger(tmp_path / "inputs.db")
    ledger.record(fed(aligned, inputs))
    with pytest.raises(Refused, match=f"inputs: .* holds for {inputs}, rows .* with tokens"):
        ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)


def test_rows_of_a_routed_op_say_how_they_were_routed_whatever_was_aligned(
    tmp_path: Path, aligned: AlignResult
) -> None:
    ledger = Ledger(tmp_path / "inputs.db")
    admitting = ledger.record(dataclasses.replace(fed(aligned, "captured"), op="moe"))
    found = ask_ledger(ledger, MOE, ("",), "vllm", gpu=H100)
    assert (found.differences, found.verdicts) == ((), admitting)
    ledger.record(dataclasses.replace(fed(aligned, "normal"), op="moe"))
    assert ask_ledger(ledger, MOE, ("",), "vllm", gpu=H100).verdicts == admitting


def test_a_later_look_at_other_inputs_does_not_supersede(
    tmp_path: Path, aligned: AlignResult
) -> None:
    ledger = Ledger(tmp_path / "inputs.db")
    admitting = ledger.record(fed(aligned, "tokens"))
    ledger.record(fed(aligned, "captured"))
    found = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    assert found.differences == ()
    assert found.verdicts == admitting
