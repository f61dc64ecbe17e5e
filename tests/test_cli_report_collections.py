"""`opkit report` of collections: text, Markdown, JSON, page, a shipped table, and two compared."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cli_runs import Ran, run_main
from made_collections import write_collection
from made_rows import about, dsa_row, failed_row, grid, measured

from opkit.collect.tables.write import write_tables
from opkit.collect.work import Fault, Row, row_from_json
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE
from opkit.layers.dsa import DSA

Opkit = Callable[..., Ran]
COLLECTED = Path(__file__).parent / "traces" / "collected"


@pytest.fixture
def opkit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """Runs ``opkit WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: run_main(capsys, monkeypatch, *words)


def collection(folder: Path, rows: Sequence[Row]) -> Path:
    """A folder of tables as `opkit collect` writes them."""
    write_tables(DSA, list(rows), about(), folder / "tables")
    return folder


def slower(rows: Sequence[Row], count: int, factor: float = 1.5) -> list[Row]:
    """The rows, the first ``count`` taking ``factor`` times as long."""
    return [
        replace(row, measurement=measured(factor * ms, factor * ms * 0.95))
        if number < count and row.measurement and (ms := row.measurement.elapsed_ms[0])
        else row
        for number, row in enumerate(rows)
    ]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return collection(tmp_path / "opkit-out" / "collect" / "dsa-vllm", grid())


@pytest.mark.parametrize("word", ["dsa-vllm", "opkit-out/collect/dsa-vllm"])
@pytest.mark.usefixtures("made")
def test_a_collection_is_known_by_name_and_folder(opkit: Opkit, word: str) -> None:
    ran = opkit("report", word)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("dsa on vllm")
    assert [line.split()[0] for line in lines if "12 rows" in line] == [
        "dsa_context_module",
        "dsa_generation_module",
    ]


@pytest.mark.usefixtures("made")
def test_every_form_holds_the_rows_and_their_latency(opkit: Opkit, tmp_path: Path) -> None:
    data = json.loads(opkit("report", "dsa-vllm", "--json").out)
    assert data["schema"] == "opkit.collection_report/1"
    assert [table["rows"] for table in data["tables"]] == [12, 12]

    markdown = opkit("report", "dsa-vllm", "--markdown").out
    assert markdown.startswith("### dsa on vllm\n")
    assert "| dsa_context_module | 12 | complete |" in markdown

    ran = opkit("report", "dsa-vllm", "--html", ".")
    assert (ran.code, ran.out) == (0, "")
    page = (tmp_path / "dsa-vllm.html").read_text("utf-8")
    assert "dsa_generation_module" in page
    said, wrote = ran.err.splitlines()  # the first before the charts, which take seconds
    assert said.endswith(" s  drawing the page of dsa-vllm")
    assert wrote.startswith("wrote dsa-vllm.html (")


@pytest.mark.usefixtures("made")
def test_a_shipped_table_stands_beside_the_rows(opkit: Opkit, tmp_path: Path) -> None:
    other = collection(tmp_path / "other", slower(grid(), 24, 2.0))
    shipped = other / "tables" / "dsa_context_module_perf.txt"
    ran = opkit("report", "dsa-vllm", "--shipped", shipped)
    row = next(line for line in ran.out.splitlines() if "× shipped" in line)
    assert row.split()[-1] == "shipped"
    assert "0.50 (0.50 to 0.50)" in ran.out
    missing = opkit("report", "dsa-vllm", "--shipped", "no.parquet")
    assert missing.code == EXIT_BAD_INPUT
    assert "no.parquet: not a readable perf table" in missing.complaint()


def test_rows_that_changed_are_listed_and_exit_with_1(
    opkit: Opkit, made: Path, tmp_path: Path
) -> None:
    """GIVEN twelve of 24 rows half as fast again, THEN twelve are slower and the rest are not."""
    after = collection(tmp_path / "after", slower(grid(), 12))
    ran = opkit("report", "--compare", made, after)
    assert ran.code == 1
    assert ran.out.splitlines()[-1] == "DIFFERENT  12 slower; 24 rows that both have"
    assert ran.out.count("▲ 1.500") == 12

    data = json.loads(opkit("report", "--compare", made, after, "--json").out)
    assert (data["schema"], data["kind"], data["differs"]) == (
        "opkit.compare/1",
        "collection",
        True,
    )
    assert [data[side]["name"] for side in "ab"] == [str(made), str(after)]
    assert data["overall"]["slower"] == 12

    markdown = opkit("report", "--compare", made, after, "--markdown").out
    assert "**DIFFERENT 12 slower; 24 rows that both have**" in markdown

    ran = opkit("report", "--compare", made, after, "--html", "both.html")
    assert (ran.code, ran.out) == (1, "")
    page = (tmp_path / "both.html").read_text("utf-8")
    assert "12 slower; 24 rows that both have" in page
    assert page.count("▲ 1.500</span>") == 12
    assert "<summary>12 rows changed</summary>" in markdown


def test_equal_collections_exit_with_0(opkit: Opkit, made: Path, tmp_path: Path) -> None:
    ran = opkit("report", "--compare", made, collection(tmp_path / "again", grid()))
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith("NO DIFFERENCE  24 rows that both have")


def test_rows_of_one_side_only_are_a_difference(opkit: Opkit, made: Path, tmp_path: Path) -> None:
    more = collection(tmp_path / "more", [*grid(), dsa_row(8, 512, 0, 8.0)])
    ran = opkit("report", "--compare", made, more)
    assert ran.code == 1
    assert "only in B: dsa_context_module" in ran.out
    assert ran.out.splitlines()[-1] == "DIFFERENT  1 only in B; 24 rows that both have"


@pytest.mark.parametrize("swapped", [False, True])
def test_an_alignment_is_no_collection(opkit: Opkit, made: Path, swapped: bool) -> None:
    sides = [made, COLLECTED / "dsa-h100-alignment.json.gz"]
    ran = opkit("report", "--compare", *(reversed(sides) if swapped else sides))
    assert ran.code == EXIT_USAGE
    assert "dsa-vllm is a collection" in ran.complaint()
    assert "dsa-h100-alignment is an alignment" in ran.err


def test_a_tolerance_is_for_alignments(opkit: Opkit, made: Path, tmp_path: Path) -> None:
    again = collection(tmp_path / "again", grid())
    ran = opkit("report", "--compare", made, again, "--tolerance", "0.05")
    assert ran.code == EXIT_USAGE
    assert "--tolerance is for alignments" in ran.complaint()


def test_a_real_collection_is_shown(opkit: Opkit, tmp_path: Path) -> None:
    """GIVEN the rows of a real H100 collection, THEN each is counted, and none has moved."""
    with gzip.open(COLLECTED / "dsa-h100-rows.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row_from_json(line, "recorded") for line in file]
    collection(tmp_path / "real", rows)
    ran = opkit("report", "real")
    assert ran.code == 0
    counts = re.findall(r"^dsa_\w+  ([\d,]+) rows", ran.out, flags=re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in counts) == len(rows) == 536
    again = opkit("report", "--compare", "real", collection(tmp_path / "again", rows))
    assert again.code == 0


def test_a_case_without_a_row_is_told_by_its_sizes(opkit: Opkit, tmp_path: Path) -> None:
    """GIVEN a case that failed, THEN its line says what tells it apart, and no more."""
    rows = [row for row in grid() if row.table == "dsa_context_module"]
    lost = failed_row(1, 8192, 0, Fault.MEMORY, "12 GiB")
    write_collection(tmp_path / "lost", rows, about(), loose=[lost])
    ran = opkit("report", "lost")
    [line] = [line for line in ran.out.splitlines() if line.startswith("no row:")]
    assert line == "no row: batch 1 · isl 8,192: failed (12 GiB)"
