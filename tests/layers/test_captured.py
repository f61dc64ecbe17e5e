"""Captured inputs: a folder that tells what it is, and the rows of any step out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opkit.errors import EXIT_BAD_INPUT, BadInput
from opkit.layers.captured import (
    SCHEMA,
    Captured,
    CaptureInfo,
    Key,
    in_order,
    input_name,
    key_text,
    read_info,
)
from opkit.layers.op import Case, Phase

INFO = CaptureInfo(
    op="dsa",
    backend="vllm",
    layer=3,
    seed=7,
    model_sha256="ab",
    versions={"vllm": "0.24.0"},
    command="vllm serve m",
    created="2026-11-21T20:00:00+00:00",
    lengths={"512-0": 518},
)
HIDDEN = "self_attn/hidden_states"
# Tokens stored of each request: waves 1x512+96, 4x1024+96 and 1x4096+96 of a short engine's run.
LENGTHS: dict[Key, int] = {(512, 0): 607, (4096, 0): 4191, **{(1024, n): 1119 for n in range(4)}}


def context(batch: int, tokens: int, past: int = 0) -> Case:
    return Case(Phase.CONTEXT, batch, tokens, past)


def generation(batch: int, past: int) -> Case:
    return Case(Phase.GENERATION, batch, 1, past)


def folder_of(path: Path, lengths: dict[Key, int] = LENGTHS, **changes: Any) -> Path:
    """A capture's folder without its tensors."""
    named = {key_text(key): length for key, length in lengths.items()}
    replace(INFO, lengths=named, **changes).write(path)
    return path


def open_folder(path: Path) -> Captured:
    return Captured(path, "dsa", "vllm")


def refusal(path: Path, op: str = "dsa", backend: str = "vllm") -> BadInput:
    with pytest.raises(BadInput) as caught:
        Captured(path, op, backend)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_a_capture_is_comes_back(tmp_path: Path) -> None:
    INFO.write(tmp_path)
    assert read_info(tmp_path) == INFO
    assert json.loads((tmp_path / "capture.json").read_text())["schema"] == SCHEMA


def test_names_are_paths() -> None:
    assert input_name("mlp.gate_up_proj", "input_") == "mlp.gate_up_proj/input_"
    assert key_text((4096, 3)) == "4096-3"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        json.dumps({"schema": "opkit.capture/0", "op": "dsa"}),
        json.dumps({"schema": SCHEMA, "op": "dsa"}),
        json.dumps(
            {"schema": SCHEMA, "op": "dsa", "backend": "vllm", "layer": 0, "seed": 0, "x": 1}
        ),
    ],
)
def test_a_folder_that_tells_nothing_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "capture.json").write_text(text)
    refused = refusal(tmp_path)
    assert str(refused).startswith(f"{tmp_path}/capture.json: no readable capture (")
    assert "--inputs captured" in (refused.hint or "")


@pytest.mark.parametrize("lengths", [[], "512-0", {"512": 3}, {"a-0": 3}, {"512-0": "3"}, None])
def test_lengths_that_name_no_sequences_are_refused(tmp_path: Path, lengths: Any) -> None:
    INFO.write(tmp_path)
    path = tmp_path / "capture.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lengths": lengths}))
    assert str(refusal(tmp_path)).startswith(f"{tmp_path}/capture.json: no readable capture (")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in str(refusal(tmp_path / "none"))


def test_an_empty_capture_is_refused(tmp_path: Path) -> None:
    assert "holds no inputs" in str(refusal(folder_of(tmp_path, {})))


@pytest.mark.parametrize(("op", "backend"), [("mla", "vllm"), ("dsa", "trtllm")])
def test_another_mocks_inputs_are_refused(tmp_path: Path, op: str, backend: str) -> None:
    said = str(refusal(folder_of(tmp_path), op, backend))
    assert said == f"{tmp_path}: captured for dsa on vllm, not for {op} on {backend}"


def test_the_layer_and_model_that_were_captured_are_taken(tmp_path: Path) -> None:
    captured = open_folder(folder_of(tmp_path))
    captured.require(3, "ab")
    with pytest.raises(BadInput, match="from layer 3, the mock stands for layer 0") as caught:
        captured.require(0, "ab")
    assert caught.value.hint == "give --layer 3"
    with pytest.raises(BadInput, match=r"captured from a model with another config\.json"):
        captured.require(3, "cd")


def test_a_capture_that_does_not_know_its_model_is_taken(tmp_path: Path) -> None:
    open_folder(folder_of(tmp_path, model_sha256="")).require(3, "cd")


@pytest.mark.parametrize(
    ("case", "prompt"),
    [
        (context(1, 512), 512),
        (context(1, 1024), 1024),
        (context(4, 1024), 1024),
        (context(1, 4096), 4096),
        (context(1, 100), 512),  # the first prompt that is long enough
        (context(1, 2048, 2048), 4096),  # the second half of a prompt in chunks
        (generation(1, 512), 512),
        (generation(1, 606), 512),  # the last decode step
        (generation(1, 1055), 1024),
        (generation(4, 1118), 1024),
        (generation(1, 4190), 4096),
    ],
    ids=lambda given: given.label() if isinstance(given, Case) else str(given),
)
def test_a_case_takes_the_wave_that_ran_it(tmp_path: Path, case: Case, prompt: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    folder = folder_of(tmp_path)
    for (tokens, number), length in LENGTHS.items():
        rows = torch.full((length, 2), float(tokens))
        torch.save({HIDDEN: rows}, folder / f"sequence-{tokens}-{number}.pt")
    captured = open_folder(folder)
    captured.select(case)
    assert captured.rows(HIDDEN, [(0, case.past, 1)]).tolist() == [[prompt, prompt]]


@pytest.mark.parametrize(
    "case",
    [
        context(2, 2048),  # one request of that length ran
        context(1, 4097),
        context(1, 1, 4096),  # that step decoded
        context(5, 1024),
        generation(1, 511),
        generation(1, 607),  # one token further than what was stored
        generation(2, 4100),
        generation(5, 1055),
        generation(1, -1),
    ],
    ids=Case.label,
)
def test_a_case_that_did_not_run_is_refused(tmp_path: Path, case: Case) -> None:
    with pytest.raises(BadInput, match=f"no captured step of {case.phase} ") as caught:
        open_folder(folder_of(tmp_path)).select(case)
    assert case.label() in str(caught.value)
    assert caught.value.hint


@pytest.fixture
def stored(tmp_path: Path) -> Captured:
    """Two requests of six tokens, two inputs each; row r of request n is 100n + r."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    folder_of(tmp_path, {(4, 0): 6, (4, 1): 6})
    for number in (0, 1):
        rows = torch.arange(6.0)[:, None] + 100 * number
        inputs = {HIDDEN: rows.expand(6, 3).clone(), "self_attn.indexer/x": -rows}
        torch.save(inputs, tmp_path / f"sequence-4-{number}.pt")
    return open_folder(tmp_path)


def test_rows_come_in_the_order_of_the_step(stored: Captured) -> None:
    stored.select(context(2, 4))
    rows = stored.rows(HIDDEN, [(1, 0, 4), (0, 2, 2)])
    assert rows.shape == (6, 3)
    assert rows[:, 0].tolist() == [100, 101, 102, 103, 2, 3]
    assert stored.rows("self_attn.indexer/x", [(1, 5, 1)]).tolist() == [[-105]]


def test_only_stored_names_are_there(stored: Captured) -> None:
    assert stored.has(HIDDEN)
    assert not stored.has("self_attn/positions")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([(0, 5, 2)], "sequence 4-0 has 6 captured tokens, 7 are needed"),
        ([(0, 0, 6), (2, 0, 1)], "sequence 4-2 has 0 captured tokens, 1 are needed"),
    ],
)
def test_rows_that_were_not_stored_are_refused(
    stored: Captured, rows: list[tuple[int, int, int]], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        stored.rows(HIDDEN, rows)


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"PK\x03\x04 cut off"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    captured = open_folder(folder_of(tmp_path, {(4, 0): 6}))
    path = tmp_path / "sequence-4-0.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"sequence-4-0\.pt: cannot be read") as caught:
        captured.rows(HIDDEN, [(0, 0, 1)])
    assert "\n" not in str(caught.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    mark = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    captured = open_folder(folder_of(tmp_path, {(4, 0): 6}))
    torch.save({HIDDEN: Runs()}, tmp_path / "sequence-4-0.pt")
    with pytest.raises(BadInput, match="cannot be read"):
        captured.has(HIDDEN)
    assert not mark.exists()


def test_parts_of_a_request_come_in_the_order_of_its_tokens() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
    rows = torch.arange(10).float()[:, None]
    parts = [(4, rows[4:7]), (0, rows[:5]), (7, rows[7:10])]
    assert torch.equal(torch.cat(in_order(parts)), rows)
    assert torch.equal(torch.cat(in_order([(0, rows[:3]), (5, rows[5:])])), rows[:3])  # a gap
    assert in_order([(1, rows[1:])]) == []
