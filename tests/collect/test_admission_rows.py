"""Admission of rows that know no phase: every aligned phase of their op must have passed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult, Outcome
from opkit.collect.admission import Admission, ask_ledger, check_mock
from opkit.collect.options import _modes, _phases
from opkit.errors import Refused, WrongUsage
from opkit.layers.gemm import GEMM
from opkit.layers.manifest import Manifest
from opkit.layers.moe import MOE
from opkit.layers.op import LaunchMode

H100 = "NVIDIA H100 80GB HBM3"
NONE = ("",)


def moe(aligned: AlignResult, *phases: str, **changes: Any) -> AlignResult:
    """The bundled verdict as if it were on ``moe``, in some of its phases."""
    kept = tuple(item for item in aligned.phases if str(item.phase) in phases)
    return dataclasses.replace(aligned, op="moe", **{"phases": kept, **changes})


def ledger_of(tmp_path: Path, *results: AlignResult) -> Ledger:
    made = Ledger(tmp_path / "moe.db")
    for result in results:
        made.record(result)
    return made


def test_both_phases_admit(tmp_path: Path, aligned: AlignResult) -> None:
    ledger = ledger_of(tmp_path, moe(aligned, "context", "generation"))
    found = ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100)
    assert found.differences == ()
    assert set(found.entries) == {"context", "generation"}
    assert len(found.verdicts.split()) == 1


def test_verdicts_of_two_alignments_admit_together(tmp_path: Path, aligned: AlignResult) -> None:
    later = {**aligned.provenance, "created": "2027-01-01T00:00:00+00:00"}
    ledger = ledger_of(
        tmp_path, moe(aligned, "context"), moe(aligned, "generation", provenance=later)
    )
    found = ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100)
    assert found.differences == ()
    assert len(found.verdicts.split()) == 2


@pytest.mark.parametrize(("passed", "lacking"), [("context", "generation"),
                                                 ("generation", "context")])  # fmt: skip
def test_one_phase_is_not_enough(
    tmp_path: Path, aligned: AlignResult, passed: str, lacking: str
) -> None:
    with pytest.raises(Refused, match=f"not admitted: no verdict on moe {lacking} for vllm$"):
        ask_ledger(ledger_of(tmp_path, moe(aligned, passed)), MOE, NONE, "vllm", gpu=H100)


def test_a_failed_phase_refuses(tmp_path: Path, aligned: AlignResult) -> None:
    failed = tuple(
        dataclasses.replace(p, verdict=Outcome.FAIL) if str(p.phase) == "generation" else p
        for p in aligned.phases
    )
    ledger = ledger_of(tmp_path, dataclasses.replace(aligned, op="moe", phases=failed))
    with pytest.raises(Refused, match="newest verdict on moe generation"):
        ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100)


def test_no_verdict_at_all_is_said_once(tmp_path: Path, aligned: AlignResult) -> None:
    ledger = ledger_of(tmp_path, moe(aligned, "context", "generation"))
    with pytest.raises(Refused, match=r"not admitted: no verdict on gemm for torch$"):
        ask_ledger(ledger, GEMM, NONE, "torch")
    with pytest.raises(Refused, match=r"no verdict on moe for trtllm \(there is one on vllm\)$"):
        ask_ledger(ledger, MOE, NONE, "trtllm")


def test_rows_stand_on_both_verdicts(tmp_path: Path, aligned: AlignResult) -> None:
    ledger = ledger_of(tmp_path, moe(aligned, "context", "generation"))
    found = ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100)
    whole = found.subject("", "0.24.0", H100)
    assert whole == found.subject("context", "0.24.0", H100)  # of one alignment: it says the same
    assert {"dtypes", "layer", "model", "framework", "gpu"} == whole.keys()
    kernels = [found.kernels(phase) for phase in ("context", "generation")]
    assert found.kernels("") == kernels[0] | kernels[1]
    assert kernels[0] != kernels[1]


def test_each_verdict_is_held_against_the_mock(tmp_path: Path, aligned: AlignResult) -> None:
    other = {**aligned.provenance, "dtypes": {"weights": "float8_e4m3fn"}}
    ledger = ledger_of(
        tmp_path, moe(aligned, "context"), moe(aligned, "generation", provenance=other)
    )
    found = ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100, waiver="a try")
    known = aligned.provenance
    mock = Manifest(
        side="mock", op="moe", backend="vllm", versions=known["versions"], model=known["model"],
        dtypes=known["dtypes"], engine_args=tuple(known["engine_args"]),
        layer_source=known["layer_source"],
    )  # fmt: skip
    told = check_mock(found, mock, H100).differences
    assert any("dtype of weights" in line and "float8_e4m3fn" in line for line in told)
    # Two subjects are not one: keys must tell.
    assert found.subject("", "0.24.0", H100) != found.subject("context", "0.24.0", H100)


def test_rows_without_a_phase_are_measured_in_graphs(tmp_path: Path, aligned: AlignResult) -> None:
    ledger = ledger_of(tmp_path, moe(aligned, "context", "generation"))
    found = ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100)
    assert _modes(NONE, found, eager=False) == {"": LaunchMode.GRAPH}
    assert _modes(NONE, Admission("gemm", "torch"), eager=False) == {"": LaunchMode.GRAPH}
    assert _modes(NONE, found, eager=True) == {"": LaunchMode.EAGER}
    with pytest.raises(Refused, match="holds for generation in mode graph, asked for is eager"):
        ask_ledger(ledger, MOE, NONE, "vllm", gpu=H100, eager=True)


def test_a_phase_cannot_be_asked_for() -> None:
    assert _phases(MOE, ()) == ("",)
    with pytest.raises(WrongUsage, match="moe has no phase context") as caught:
        _phases(MOE, ("context",))
    assert caught.value.hint == "one table holds for both phases"
