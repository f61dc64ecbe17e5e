"""`opkit report`: what is meant by an id, in which form it is shown, and what two of them tell."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import sqlite3
import stat
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Ran, run_main
from made_result import made_result, passed_phase

from opkit.align import result as results
from opkit.align.ledger import Ledger
from opkit.align.result import AlignResult, Outcome
from opkit.align.result_json import align_json
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE

Opkit = Callable[..., Ran]
TRACES = Path(__file__).parent / "traces"
COLLECTED = TRACES / "collected" / "dsa-h100-alignment.json.gz"
OUT = "opkit-out"


@pytest.fixture
def opkit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Opkit:
    """Runs ``opkit WORDS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: run_main(capsys, monkeypatch, *words)


def passed(op: str = "dsa") -> AlignResult:
    return replace(
        made_result(), op=op, verdict=Outcome.PASS, phases=(passed_phase(),), notes=("passed",)
    )


@pytest.fixture
def ids(tmp_path: Path) -> dict[str, str]:
    """A ledger of three verdicts: ``failed`` dsa, then ``passed`` dsa, then ``other``, of mla."""
    made = {}
    for day, (name, result) in enumerate(
        {"failed": made_result(), "passed": passed(), "other": passed("mla")}.items(), start=1
    ):
        at = datetime(2026, 11, day, 12, tzinfo=UTC)
        made[name] = Ledger(tmp_path / OUT / "ledger.db", now=lambda at=at: at).record(result)
    return made


def shown(ran: Ran) -> dict[str, Any]:
    """What `--json` printed."""
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert isinstance(data, dict)
    return data


@pytest.mark.usefixtures("ids")
def test_without_an_id_the_newest_verdict_is_shown(opkit: Opkit) -> None:
    """GIVEN three verdicts, WHEN no id is given, THEN the last one is shown as `align` did."""
    ran = opkit("report")
    assert ran.code == 0
    assert "mla · vllm" in ran.out
    assert " PASS " in ran.out
    stored = json.loads(json.dumps(align_json(passed("mla"))))
    assert shown(opkit("report", "--json")) == stored


@pytest.mark.parametrize(
    ("word", "of"),
    [
        (lambda name: name, "failed"),
        (lambda name: name.rsplit("-", 1)[-1], "failed"),
        (lambda name: name.rsplit("-", 1)[-1][:4], "failed"),
        (lambda name: name[:12], "failed"),
        (lambda name: name.split("-")[0], "passed"),  # an op: its newest
    ],
    ids=["whole", "last part", "its beginning", "beginning", "op"],
)
def test_an_id_is_known_by_its_parts(
    opkit: Opkit, ids: dict[str, str], word: Callable[[str], str], of: str
) -> None:
    found = shown(opkit("report", word(ids[of]), "--json"))
    assert found["verdict"] == ("fail" if of == "failed" else "pass")
    assert found["op"] == "dsa"


def test_status_shows_a_short_id_that_report_takes(opkit: Opkit, ids: dict[str, str]) -> None:
    heading, _, *rows = opkit("status").out.splitlines()
    assert heading.split()[-1] == "id"
    short = {row.split()[-1] for row in rows}
    assert short == {name.rsplit("-", 1)[-1] for name in ids.values()}
    for word in short:
        assert opkit("report", word).code == 0
    entries = json.loads(opkit("status", "--json").out)["entries"]
    assert {entry["short"] for entry in entries} == short


@pytest.mark.usefixtures("ids")
def test_a_file_a_run_and_another_output_folder_are_shown(opkit: Opkit, tmp_path: Path) -> None:
    run = tmp_path / OUT / "align-dsa-20261101-120000"
    run.mkdir()
    (run / "result.json").write_text(json.dumps(align_json(made_result())))
    (tmp_path / "kept.json").write_text(json.dumps(align_json(passed("moe"))))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / OUT / "ledger.db").rename(tmp_path / "elsewhere" / "ledger.db")
    for word, op, verdict in (
        (run, "dsa", "fail"),
        (run / "result.json", "dsa", "fail"),
        ("kept.json", "moe", "pass"),
        ("elsewhere", "mla", "pass"),
        ("elsewhere/ledger.db", "mla", "pass"),
        (COLLECTED, "dsa", "pass"),
    ):
        found = shown(opkit("report", word, "--json"))
        assert (found["op"], found["verdict"], found["schema"]) == (op, verdict, "opkit.align/1")


def test_what_is_not_there_lists_what_there_is(opkit: Opkit, ids: dict[str, str]) -> None:
    ran = opkit("report", "nothing")
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint().startswith("nothing: no verdict, run, result file, collection")
    for name in ids.values():
        assert name in ran.err


@pytest.mark.parametrize(
    ("files", "words", "sentence"),
    [
        ({}, ["report"], "opkit-out: no verdict has been recorded there"),
        ({}, ["report", "dsa"], "dsa: no verdict, run, result file, collection"),
        ({"a.json": "{}"}, ["report", "a.json"], "a.json: schema none"),
        ({"a.json": '{"schema": "opkit.verify/1"}'}, ["report", "a.json"], "schema opkit.verify/1"),
        ({"a.json": "[1]"}, ["report", "a.json"], "a.json: not a result of opkit"),
        ({"a.json": '{"a": NaN}'}, ["report", "a.json"], "NaN is no number"),
        ({"a.json": '{"schema": "opkit.align/1"}'}, ["report", "a.json"], "damaged alignment"),
        ({"a.sqlite": "SQLite"}, ["report", "a.sqlite"], "a.sqlite: not a JSON file"),
        (
            {"run/mock.log": ""},
            ["report", "run"],
            "run: holds no result (result.json, summary.json)",
        ),
        ({"run/run.json": "{}"}, ["report", "run"], "run/run.json: not a collection of schema"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(
    opkit: Opkit, tmp_path: Path, files: dict[str, str], words: list[str], sentence: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    ran = opkit(*words)
    assert ran.code == EXIT_BAD_INPUT
    assert sentence in ran.complaint()


def test_a_damaged_archive_is_one_sentence(opkit: Opkit, tmp_path: Path) -> None:
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b"{}" * 1000)[:20])
    ran = opkit("report", "cut.json.gz")
    assert ran.code == EXIT_BAD_INPUT
    assert "not a JSON file" in ran.complaint()


def test_an_id_that_may_mean_two_names_both(opkit: Opkit, ids: dict[str, str]) -> None:
    ran = opkit("report", "dsa-2026")
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint() == "dsa-2026: several verdicts begin or end so"
    assert ids["failed"] in ran.err
    assert ids["passed"] in ran.err
    assert ids["other"] not in ran.err


def optional_names() -> set[str]:
    """Fields that results gained later, all with a default."""
    parts = (results.KernelStat, results.SideSummary, results.CaseMatch)
    return {item.name for part in parts for item in fields(part) if item.default is not MISSING}


def without(data: Any, names: set[str]) -> Any:
    """JSON as an opkit wrote it that did not know these fields."""
    if isinstance(data, dict):
        return {key: without(value, names) for key, value in data.items() if key not in names}
    return [without(item, names) for item in data] if isinstance(data, list) else data


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--html", "-"]], ids=str)
@pytest.mark.usefixtures("ids")
def test_a_ledger_of_an_older_opkit_is_still_shown(
    opkit: Opkit, tmp_path: Path, form: list[str]
) -> None:
    """GIVEN stored results without the fields that came later, THEN every form is shown."""
    assert "samples_ns" in optional_names()
    with sqlite3.connect(tmp_path / OUT / "ledger.db") as db:
        stored = json.loads(db.execute("SELECT result FROM verdict").fetchone()[0])
        old = without(stored, optional_names())
        assert old != stored
        db.execute("UPDATE verdict SET result = ? WHERE op = 'dsa'", [json.dumps(old)])
    db.close()
    ran = opkit("report", "dsa", *form)
    assert (ran.code, ran.err) == (0, "")
    assert "sparse_attn_fwd_kernel" in ran.out


def test_markdown_goes_to_stdout(opkit: Opkit, ids: dict[str, str]) -> None:
    ran = opkit("report", ids["failed"], "--markdown")
    assert ran.out.startswith("### ❌ `opkit align dsa` · vllm: **FAIL**\n")
    assert (ran.code, ran.err) == (0, "")


def test_html_is_written_once_and_said(opkit: Opkit, ids: dict[str, str], tmp_path: Path) -> None:
    ran = opkit("report", "--html", "page.html")
    page = tmp_path / "page.html"
    size = page.stat().st_size
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"wrote page.html ({size / 1000:,.0f} kB)\n"
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")

    again = opkit("report", "--html", "page.html")
    assert again.code == EXIT_BAD_INPUT
    assert again.complaint() == "page.html: exists already"
    assert "--force" in again.err
    assert opkit("report", ids["failed"], "--html", "page.html", "--force").code == 0
    assert page.stat().st_size != size
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_gets_a_page_named_after_the_verdict(
    opkit: Opkit, ids: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "pages").mkdir()
    assert opkit("report", "dsa", "--html", "pages").code == 0
    assert [path.name for path in (tmp_path / "pages").iterdir()] == [f"{ids['passed']}.html"]


def test_only_a_verdict_of_the_ledger_has_an_id(
    opkit: Opkit, ids: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "kept.json").write_text(json.dumps(align_json(passed())))
    assert (
        f"<dt>ledger id</dt><dd>{ids['passed']}</dd>" in opkit("report", "dsa", "--html", "-").out
    )
    assert "ledger id" not in opkit("report", "kept.json", "--html", "-").out


@pytest.mark.usefixtures("ids")
def test_html_to_stdout_is_the_page_alone(opkit: Opkit) -> None:
    ran = opkit("report", "--html", "-")
    assert ran.out.startswith("<!DOCTYPE html>")
    assert ran.out.rstrip().endswith("</html>")
    assert ran.err == ""


@pytest.mark.usefixtures("ids")
def test_a_page_that_cannot_be_written_leaves_nothing(opkit: Opkit) -> None:
    ran = opkit("report", "--html", "no/such/folder/page.html")
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint() == "no/such/folder/page.html: no such folder as no/such/folder"


@pytest.mark.usefixtures("ids")
def test_a_link_stays_a_link_and_a_pipe_is_written_into(opkit: Opkit, tmp_path: Path) -> None:
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    assert opkit("report", "--html", "link.html", "--force").code == 0
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "real.html").read_text("utf-8").startswith("<!DOCTYPE html>")

    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 1 << 20)  # nobody reads until all is written
        assert opkit("report", "--html", "pipe").code == 0
        assert os.read(reader, 15) == b"<!DOCTYPE html>"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--html", "x", "--json"], "--html, --markdown and --json exclude each other"),
        (["--markdown", "--json"], "--html, --markdown and --json exclude each other"),
        (["dsa", "--compare", "a", "b"], "--compare takes A and B, and nothing beside them"),
        (["--compare", "a", "b", "--html", "x", "--json"], "exclude each other"),
        (["--tolerance", "0.1"], "--tolerance is for --compare"),
        (["--shipped", "t.parquet"], "--shipped is for collections"),
        (["--compare", "dsa", "mla"], "different ops"),
        (["--compare", "dsa", "dsa"], "are one alignment"),
        (["--compare", "dsa", "mla", "--tolerance", "nan"], "--tolerance is a share"),
        (["--compare", "dsa", "mla", "--shipped", "t.parquet"], "--compare takes no --shipped"),
        (["--compare", "a"], "Option '--compare' requires 2 arguments"),
        (["--compare", "dsa", "mla", "--tolerance", "-1"], "-1"),
    ],
)
@pytest.mark.usefixtures("ids")
def test_options_that_do_not_go_together(opkit: Opkit, words: list[str], sentence: str) -> None:
    ran = opkit("report", *words)
    assert ran.code == EXIT_USAGE
    assert sentence in ran.complaint()


def test_compare_tells_the_difference_and_exits_with_1(opkit: Opkit, ids: dict[str, str]) -> None:
    ran = opkit("report", "--compare", ids["failed"], ids["passed"])
    assert ran.code == 1
    assert f"A  {ids['failed']}  vllm, fail" in ran.out
    assert "context  ✗ fail → not judged" in ran.out
    assert ran.out.splitlines()[-1].startswith("DIFFERENT  0 of 1 shape changed, 2 shapes in one")

    data = json.loads(opkit("report", "--compare", ids["failed"], ids["passed"], "--json").out)
    assert (data["schema"], data["differs"]) == ("opkit.compare/1", True)


def test_a_comparison_is_a_page_too_and_exits_alike(
    opkit: Opkit, ids: dict[str, str], tmp_path: Path
) -> None:
    names = (ids["failed"], ids["passed"])
    ran = opkit("report", "--compare", *names, "--html", ".")
    assert (ran.code, ran.out) == (1, "")
    page = tmp_path / f"{names[0]}-{names[1]}.html"
    assert ran.err.startswith(f"wrote {page.name} (")
    text = page.read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "≠ different" in text
    again = opkit("report", "--compare", *names, "--html", page.name)
    assert (again.code, again.complaint()) == (EXIT_BAD_INPUT, f"{page.name}: exists already")
    assert opkit("report", "--compare", *names, "--html", page.name, "--force").code == 1
    assert opkit("report", "--compare", *names, "--html", "-").out == text


@pytest.mark.usefixtures("ids")
def test_compare_of_two_like_runs_exits_with_0(opkit: Opkit, tmp_path: Path) -> None:
    later = align_json(passed())
    later["provenance"] |= {"versions": {"vllm": "0.25.0"}}
    (tmp_path / "later.json").write_text(json.dumps(later))
    ran = opkit("report", "--compare", "dsa", "later.json")
    assert ran.code == 0
    assert "versions vllm   0.24.0 → 0.25.0" in ran.out
    assert ran.out.splitlines()[-2].startswith("NO DIFFERENCE  1 shape: the same kernels")
    assert opkit("report", "--compare", "dsa", "later.json", "--markdown").code == 0
    page = opkit("report", "--compare", "dsa", "later.json", "--html", "-")
    assert page.code == 0
    assert "= no difference" in page.out


def test_the_comparison_that_the_page_quotes(opkit: Opkit, tmp_path: Path) -> None:
    """GIVEN the bundled recording and the run behind the recorded collection, THEN docs/report.md
    quotes what is printed of them."""
    (tmp_path / "bundled.json").write_text(opkit("align", "dsa", "--recorded", "--json").out)
    ran = opkit("report", "--compare", "bundled.json", COLLECTED, "--tolerance", "0.03")
    page = (Path(__file__).parents[1] / "docs" / "report.md").read_text("utf-8")
    quoted = page[page.index("    context  ✓ pass") :].split("\n\n")[0].splitlines()
    printed = [line.rstrip() for line in ran.out.splitlines()]
    assert len(quoted) == 8
    assert [line for line in quoted if line.removeprefix("    ") not in printed] == []
