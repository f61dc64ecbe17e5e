"""Admission: only what a passed verdict holds for, every difference named, and the waiver."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from opkit.align.ledger import Ledger
from opkit.align.policy import Policy
from opkit.align.result import AlignResult, Outcome
from opkit.collect.admission import Admission, ask_ledger, check_mock
from opkit.errors import EXIT_REFUSED, Refused
from opkit.layers.dsa import DSA
from opkit.layers.manifest import Manifest
from opkit.layers.op import LaunchMode

BOTH = ("context", "generation")
H100 = "NVIDIA H100 80GB HBM3"


def mock_of(aligned: AlignResult, **changed: Any) -> Manifest:
    """What a mock says of itself that is exactly the aligned one, but for ``changed``."""
    known = aligned.provenance
    same = Manifest(
        side="mock",
        op="dsa",
        backend="vllm",
        versions=known["versions"],
        model=known["model"],
        dtypes=known["dtypes"],
        engine_args=tuple(known["engine_args"]),
        layer_source=known["layer_source"],
    )
    return dataclasses.replace(same, **changed)


def test_a_passed_verdict_admits(ledger: Ledger, aligned: AlignResult) -> None:
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    assert admission.differences == ()
    assert set(admission.entries) == set(BOTH)
    assert check_mock(admission, mock_of(aligned), H100).differences == ()
    assert admission.verdicts.startswith("dsa-")


def test_no_verdict_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no verdict on dsa context for vllm") as caught:
        ask_ledger(Ledger(tmp_path / "none.db"), DSA, BOTH, "vllm")
    assert caught.value.exit_code == EXIT_REFUSED
    assert "opkit align dsa" in (caught.value.hint or "")


def test_a_verdict_on_another_backend_is_named(ledger: Ledger) -> None:
    with pytest.raises(Refused, match="for trtllm \\(there is one on vllm\\)"):
        ask_ledger(ledger, DSA, BOTH, "trtllm")


def test_another_gpu_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Refused, match=f"was aligned on {H100}, this is NVIDIA H200"):
        ask_ledger(ledger, DSA, BOTH, "vllm", gpu="NVIDIA H200")


def test_a_newer_failed_verdict_supersedes_a_pass(ledger: Ledger, aligned: AlignResult) -> None:
    phases = tuple(dataclasses.replace(p, verdict=Outcome.FAIL) for p in aligned.phases)
    ledger.record(dataclasses.replace(aligned, phases=phases, verdict=Outcome.FAIL))
    with pytest.raises(Refused, match="is fail"):
        ask_ledger(ledger, DSA, ("context",), "vllm", gpu=H100)


def test_a_verdict_by_another_policy_is_refused(ledger: Ledger) -> None:
    with pytest.raises(Refused, match=r"judged with latency = 0.1, asked for is 0.05"):
        ask_ledger(ledger, DSA, BOTH, "vllm", policy=Policy(latency=0.05))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("versions", {"vllm": "0.25.0"}, "vllm version: .* holds for 0.24.0, this is 0.25.0"),
        ("dtypes", {"weights": "float8_e4m3fn"}, "dtype of weights: .* bfloat16, this is float8"),
        ("model", {"architecture": "GlmMoeDsaForCausalLM"}, "architecture: .*Deepseek.*Glm"),
        ("layer_source", {"vllm/x.py": "00"}, "layer source: changed since"),
        ("model", {"architecture": "DeepseekV32ForCausalLM"}, "model configuration"),
    ],
)
def test_each_difference_of_the_mock_is_named(
    ledger: Ledger, aligned: AlignResult, field: str, value: dict[str, str], message: str
) -> None:
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    with pytest.raises(Refused, match=message):
        check_mock(admission, mock_of(aligned, **{field: value}), H100)


def test_one_changed_source_file_is_enough(ledger: Ledger, aligned: AlignResult) -> None:
    name = "vllm/model_executor/models/deepseek_v2.py"
    changed = {**aligned.provenance["layer_source"], name: "0" * 64}
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    with pytest.raises(Refused, match=name):
        check_mock(admission, mock_of(aligned, layer_source=changed), H100)


def test_other_engine_flags_are_refused(tmp_path: Path, aligned: AlignResult) -> None:
    known = {**aligned.provenance, "engine_args": ["--max-model-len", "8192"]}
    ledger = Ledger(tmp_path / "flags.db")
    ledger.record(dataclasses.replace(aligned, provenance=known))
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu=H100)
    assert admission.engine_args() == ("--max-model-len", "8192")
    with pytest.raises(Refused, match=r"engine flags: .* --max-model-len 8192, this is --x"):
        check_mock(admission, mock_of(aligned, engine_args=("--x",)), H100)


def test_a_waiver_lets_through_and_keeps_the_differences(ledger: Ledger) -> None:
    admission = ask_ledger(ledger, DSA, BOTH, "vllm", gpu="NVIDIA H200", waiver="first look")
    assert admission.waiver == "first look"
    assert len(admission.differences) == 2
    later = check_mock(admission, Manifest(side="mock"), "NVIDIA H200")
    assert len(later.differences) > 2


def test_the_verdict_tells_mode_and_kernels(ledger: Ledger) -> None:
    admission = ask_ledger(ledger, DSA, BOTH, "vllm")
    assert admission.mode("context") is LaunchMode.EAGER
    assert admission.mode("generation") is LaunchMode.GRAPH
    assert any("sparse_attn_fwd_kernel" in kind for kind in admission.kernels("generation"))
    assert any("topKPerRowPrefill" in kind for kind in admission.kernels("context"))
    assert Admission("gemm", "torch").mode("") is None


def test_what_keys_stand_for_does_not_change_with_the_verdicts_number(
    ledger: Ledger, aligned: AlignResult
) -> None:
    before = ask_ledger(ledger, DSA, BOTH, "vllm").subject("context", "0.24.0", H100)
    again = dataclasses.replace(
        aligned, provenance={**aligned.provenance, "created": "2027-01-01T00:00:00+00:00"}
    )
    ledger.record(again)
    asked = ask_ledger(ledger, DSA, ("context",), "vllm")
    assert asked.subject("context", "0.24.0", H100) == before
    assert json.dumps(before)
