"""The ledger remembers verdicts, with what they hold for, also when two processes write."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult, Method, Outcome, PhaseResult
from opkit.errors import BadInput
from opkit.layers.op import Phase

NOON = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


def phase(name: Phase, verdict: Outcome) -> PhaseResult:
    return PhaseResult(name, verdict, Method.LAUNCH_NVTX, 0.99, cases=(), checks=())


def result(op: str = "dsa", gpu: str = "NVIDIA H100 80GB HBM3") -> AlignResult:
    return AlignResult(
        op=op,
        backend="vllm",
        verdict=Outcome.FAIL,
        phases=(phase(Phase.CONTEXT, Outcome.FAIL), phase(Phase.GENERATION, Outcome.PASS)),
        provenance={
            "gpu": gpu,
            "versions": {"vllm": "0.24.0", "nsys": "2024.2.3", "opkit": "0.1.0"},
            "model": {"architecture": "DeepseekV32ForCausalLM"},
            "dtypes": {"weights": "bfloat16", "kv_cache": "fp8"},
            "tp_size": 2,
            "layer_source": {"deepseek_v2.py": "ab12"},
            "policy": {"latency": 0.1},
            "files": [{"name": "e2e.sqlite", "sha256": "9c2e", "bytes": 7}],
        },
    )


def ledger(tmp_path: Path, minutes: int = 0) -> Ledger:
    return Ledger(tmp_path / "sub" / "ledger.sqlite", lambda: NOON + timedelta(minutes=minutes))


def test_a_row_per_phase_with_all_that_it_holds_for(tmp_path: Path) -> None:
    name = ledger(tmp_path).record(result(), tmp_path / "report")
    entries = ledger(tmp_path).entries()
    assert name.startswith("dsa-20261121-120000-")
    assert len(name) == len("dsa-20261121-120000-") + 6
    assert {(e.phase, e.verdict, e.passed) for e in entries} == {
        ("context", "fail", False),
        ("generation", "pass", True),
    }
    entry = ledger(tmp_path).latest("dsa", Phase.GENERATION)
    assert entry is not None
    shown = dataclasses.asdict(entry)
    assert json.loads(shown.pop("result"))["schema"] == "opkit.align/1"
    assert len(shown.pop("layer_digest")) == len(shown.pop("policy_digest")) == 64
    assert shown == {
        "id": name,
        "phase": "generation",
        "op": "dsa",
        "backend": "vllm",
        "verdict": "pass",
        "created": "2026-11-21T12:00:00+00:00",
        "gpu": "NVIDIA H100 80GB HBM3",
        "framework": "0.24.0",
        "nsys": "2024.2.3",
        "opkit": "0.1.0",
        "architecture": "DeepseekV32ForCausalLM",
        "tp_size": 2,
        "dtypes": '{"weights": "bfloat16", "kv_cache": "fp8"}',
        "layer_source": '{"deepseek_v2.py": "ab12"}',
        "policy": '{"latency": 0.1}',
        "files": '[{"name": "e2e.sqlite", "sha256": "9c2e", "bytes": 7}]',
        "method": "module range of the launch",
        "attributed": 0.99,
        "report_dir": str(tmp_path / "report"),
    }
    assert entry.alignment() == result()


def test_what_is_stored_keeps_its_order_and_digests_do_not_depend_on_it(tmp_path: Path) -> None:
    versions = {"vllm": "0.24.0", "nsys": "2024.2.3", "cuda": "12.9"}
    known = result().provenance | {"versions": versions, "policy": {"latency": 0.1, "glue": 2}}
    turned = known | {"policy": {"glue": 2, "latency": 0.1}}
    for minutes, each in enumerate((known, turned)):
        ledger(tmp_path, minutes).record(dataclasses.replace(result(), provenance=each))
    new, old = ledger(tmp_path).entries(phase="context")
    assert list(old.alignment().provenance["versions"]) == list(versions)
    assert list(old.alignment().provenance) == list(known)
    assert old.as_json()["policy"] == {"latency": 0.1, "glue": 2}
    assert (old.policy, old.policy_digest) != (new.policy, new.policy_digest)
    assert old.policy_digest == new.policy_digest
    assert old.short == new.short


def test_an_entry_as_json_holds_no_json_in_strings(tmp_path: Path) -> None:
    ledger(tmp_path).record(result())
    found = ledger(tmp_path).entries(phase="context")[0].as_json()
    assert found["dtypes"] == {"weights": "bfloat16", "kv_cache": "fp8"}
    assert found["layer_source"] == {"deepseek_v2.py": "ab12"}
    assert found["policy"] == {"latency": 0.1}
    assert found["files"] == [{"name": "e2e.sqlite", "sha256": "9c2e", "bytes": 7}]
    assert found["id"].endswith(found["short"])
    assert "result" not in found


def test_trying_out_leaves_nothing(tmp_path: Path) -> None:
    ledger(tmp_path).try_out()
    assert list(tmp_path.iterdir()) == []
    ledger(tmp_path).record(result())
    ledger(tmp_path).try_out()
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["ledger.sqlite"]
    assert len(ledger(tmp_path).entries()) == 2


def nowhere(_tmp_path: Path) -> Path:
    return Path("/proc/x/ledger.db")


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "ledger.db"


@pytest.mark.parametrize("place", [nowhere, below_a_file])
def test_where_nothing_can_be_written(place: Callable[[Path], Path], tmp_path: Path) -> None:
    kept = Ledger(place(tmp_path))
    for use in (kept.try_out, lambda: kept.record(result())):
        with pytest.raises(BadInput, match=r"^[^ ]*: cannot be written \(") as caught:
            use()
        assert caught.value.hint == "--out names another folder"
        assert str(kept.path.parent) in str(caught.value)


def test_what_is_asked_for_comes_newest_first(tmp_path: Path) -> None:
    first = ledger(tmp_path).record(result())
    second = ledger(tmp_path, minutes=5).record(result())
    other = ledger(tmp_path, minutes=9).record(result(op="mla", gpu="NVIDIA B200"))
    kept = ledger(tmp_path)
    assert [e.id for e in kept.entries(phase="context")] == [other, second, first]
    assert [e.id for e in kept.entries("dsa", phase=Phase.CONTEXT)] == [second, first]
    assert [e.id for e in kept.entries(gpu="NVIDIA B200", verdict=Outcome.PASS)] == [other]
    assert [e.id for e in kept.entries(phase="context", limit=1)] == [other]
    latest = kept.latest("dsa", "context", backend="vllm")
    assert latest is not None
    assert latest.id == second
    assert kept.latest("dsa", "context", backend="trtllm") is None


def test_a_changed_layer_source_or_policy_changes_its_digest(tmp_path: Path) -> None:
    changed = dataclasses.replace(
        result(), provenance=result().provenance | {"layer_source": {"deepseek_v2.py": "cd34"}}
    )
    ledger(tmp_path).record(result())
    ledger(tmp_path, minutes=1).record(changed)
    new, old = ledger(tmp_path).entries(phase="context")
    assert new.layer_digest != old.layer_digest
    assert new.policy_digest == old.policy_digest


def test_unknown_provenance_is_empty_not_an_error(tmp_path: Path) -> None:
    ledger(tmp_path).record(dataclasses.replace(result(), provenance={}))
    entry = ledger(tmp_path).latest("dsa", "context")
    assert entry is not None
    assert (entry.gpu, entry.framework, entry.dtypes, entry.tp_size) == ("", "", "{}", 1)


def test_no_ledger_yet_is_empty_and_makes_no_file(tmp_path: Path) -> None:
    assert ledger(tmp_path).entries() == []
    assert list(tmp_path.iterdir()) == []


def test_the_same_twice_within_a_second_is_one(tmp_path: Path) -> None:
    assert ledger(tmp_path).record(result()) == ledger(tmp_path).record(result())
    assert len(ledger(tmp_path).entries()) == 2  # its two phases


def test_nothing_compared_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="without phases"):
        ledger(tmp_path).record(dataclasses.replace(result(), phases=()))


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, keep them\n" * 40)
    foreign = tmp_path / "foreign.sqlite"
    db = sqlite3.connect(foreign)
    db.execute("CREATE TABLE mine (x)")
    db.commit()
    db.close()
    for path in (text, foreign):
        before = path.read_bytes()
        uses = (
            Ledger(path).entries,
            Ledger(path).try_out,
            lambda path=path: Ledger(path).record(result()),
        )
        for use in uses:
            with pytest.raises(BadInput, match="not an opkit ledger"):
                use()
        assert path.read_bytes() == before


def write_some(path: Path, op: str, start: Any) -> None:
    start.wait()
    for minute in range(15):
        Ledger(path, lambda minute=minute: NOON + timedelta(minutes=minute)).record(result(op=op))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    writers = [
        context.Process(target=write_some, args=(path, op, start)) for op in ("dsa", "mla", "moe")
    ]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(timeout=60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(Ledger(path).entries(phase="context")) == 45
