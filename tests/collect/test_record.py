"""What a collection remembers of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from opkit.collect.measurement import Timing
from opkit.collect.record import Record, find_records, folder_of, read_record, the_record
from opkit.errors import BadInput
from opkit.layers.op import LaunchMode

CONTEXT = Record(
    op="dsa",
    backend="vllm",
    model="/model",
    engine_args=("--max-model-len", "8192"),
    modes={"context": LaunchMode.EAGER},
    seed=0,
    admitted={"context": {"gpu": "H100"}},
    timing=Timing(),
    latency="auto",
    series=("aa",),
    verdicts="dsa-1",
    updated="2026-11-21T10:00:00+00:00",
    rows={"dsa_context_module": 244},
)
GENERATION = replace(
    CONTEXT,
    modes={"generation": LaunchMode.GRAPH},
    admitted={"generation": {"gpu": "H100"}},
    series=("bb",),
    verdicts="dsa-2",
    rows={"dsa_generation_module": 184},
)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    CONTEXT.write(tmp_path)
    assert read_record(tmp_path) == CONTEXT
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_phase_collected_later_joins_the_other() -> None:
    both = GENERATION.with_other_phases(CONTEXT)
    assert both.series == ("bb", "aa")
    assert both.rows == {"dsa_context_module": 244, "dsa_generation_module": 184}
    assert both.modes == {"context": LaunchMode.EAGER, "generation": LaunchMode.GRAPH}
    assert both.verdicts == "dsa-1 dsa-2"
    again = replace(CONTEXT, series=("cc",), rows={"dsa_context_module": 245})
    assert again.with_other_phases(both).series == ("cc", "bb")


@pytest.mark.parametrize(
    "changed",
    [{"timing": Timing(pacing="sustained")}, {"model": "/other"}, {"waiver": "a look"},
     {"latency": "gpu"}],
)  # fmt: skip
def test_rows_made_otherwise_do_not_join(changed: dict[str, object]) -> None:
    other = replace(CONTEXT, **changed)  # type: ignore[arg-type]
    assert GENERATION.with_other_phases(other) == GENERATION


def test_the_newest_collection_is_found(tmp_path: Path) -> None:
    older = replace(CONTEXT, backend="sglang", updated="2026-11-20T10:00:00+00:00")
    for record in (older, CONTEXT):
        record.write(folder_of(tmp_path, record.op, record.backend))
    assert the_record(tmp_path, "dsa", "")[1].backend == "vllm"
    assert the_record(tmp_path, "dsa", "sglang")[1] == older
    assert [record.backend for _, record in find_records(tmp_path)] == ["vllm", "sglang"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "opkit.collection/0"}', "{}"])
def test_a_broken_record_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match=r"run\.json: not a"):
        read_record(tmp_path)


def test_nothing_collected_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing has been collected there"):
        read_record(tmp_path)
    with pytest.raises(BadInput, match="no dsa has been collected"):
        the_record(tmp_path, "dsa", "")
