"""The documents say what the program does: options, thresholds, exit codes, links."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from cli_runs import command, run_main

from opkit import cli, errors
from opkit.align.policy import Policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CHECKS = (ROOT / "docs" / "checks.md").read_text("utf-8")
SITE = (ROOT / "mkdocs.yml").read_text("utf-8")
# Pages that `opkit new` writes are linked by whoever keeps them.
PAGES_KEPT = {page.name for page in (ROOT / "docs").glob("*.md") if page.name[:3] != "op-"}
TEXTS = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


# Where a command's options are told.
PAGES = {
    "align": "align.md",
    "bench": "bench.md",
    "check": "check.md",
    "collect": "collect.md",
    "comm": "comm.md",
    "doctor": "doctor.md",
    "install": "tables.md",
    "model": "models.md",
    "new": "new-op.md",
    "report": "report.md",
    "status": "align.md",
    "trace": "trace.md",
    "verify": "collect.md",
}


def options_of(found: click.Command) -> Iterator[str]:
    """The long options of a command and of those below it."""
    if isinstance(found, click.Group):
        for below in found.commands.values():
            yield from options_of(below)
    for param in found.params:
        yield from (o for o in (*param.opts, *param.secondary_opts) if o.startswith("--"))


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_option_of_every_command_is_documented(name: str) -> None:
    page = PAGES.get(name, "ops.md")
    text = (ROOT / "docs" / page).read_text("utf-8")
    found = set(options_of(command(name)))
    assert {o for o in found if not re.search(rf"{o}(?![\w-])", text)} == set()


def test_every_command_and_every_page_is_in_the_readme() -> None:
    assert [name for name in cli.COMMANDS if f"`opkit {name}`" not in README] == []
    assert [page for page in PAGES_KEPT if f"](docs/{page}" not in README] == []


def test_every_page_is_in_the_site_and_on_its_front_page() -> None:
    assert set(re.findall(r"[\w-]+\.md", SITE[SITE.index("nav:") :])) >= PAGES_KEPT
    front = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert {page for page in PAGES_KEPT if f"]({page}" not in front} == {"index.md"}


def test_every_exit_code_is_documented() -> None:
    page = (ROOT / "docs" / "exit-codes.md").read_text("utf-8")
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert [code for code in codes if f"\n| {code} | " not in page] == []


@pytest.mark.parametrize("key", [field.name for field in fields(Policy)])
def test_every_threshold_and_its_default_is_documented(key: str) -> None:
    row = re.search(rf"^\| `{key}` \| (\S+) \|", CHECKS, flags=re.MULTILINE)
    assert row is not None
    default = getattr(Policy(), key)
    shown = "none" if default == () else str(default).lower()
    assert row[1] == shown


@pytest.mark.parametrize("path", TEXTS)
def test_links_lead_somewhere(path: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / path).read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^):]+)\)", text) + re.findall(r'(?:src|srcset)="([^":]+)"', text)
    assert [t for t in targets if not leads(ROOT / path, t)] == []


def leads(page: Path, target: str) -> bool:
    """Whether a link's file is there, and the heading that it names."""
    name, _, anchor = target.partition("#")
    file = page.parent / name if name else page
    return file.exists() and (not anchor or anchor in anchors(file.read_text("utf-8")))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^(```|    ).*$", "", text, flags=re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").glob("*.png")}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > 300_000} == {}


def commands_in(text: str) -> Iterator[str]:
    """The `opkit` commands of a page's code, one line each; quotes may span lines."""
    lines = iter(text.splitlines())
    for line in lines:
        found = re.match(r" {4,}(?:\$ )?(opkit .*)", line)
        if not found:
            continue
        said = found[1]
        while said.endswith("\\") or plain(said).count('"') % 2:
            said = said.removesuffix("\\") + " " + next(lines).strip()
        yield said
    yield from re.findall(r"`(opkit [^`]* --?[^`]*)`", text)


def plain(said: str) -> str:
    """The command without its comment and its escaped quotes."""
    return re.sub(r"\s#.*", "", said).replace('\\"', "")


@pytest.mark.parametrize("path", TEXTS)
def test_commands_are_taken_by_the_program(path: str) -> None:
    """GIVEN every command that a page quotes, WHEN it is parsed, THEN nothing is refused."""
    wrong = {}
    for said in commands_in((ROOT / path).read_text("utf-8")):
        words = shlex.split(said, comments=True)[1:]
        if any(word in ("…", "OP") for word in words[1:2]) and words[0] == "trace":
            continue  # any of its commands
        ends = (n for n, word in enumerate(words) if word in ("|", ">", "&&") or word.endswith(";"))
        words = [word.rstrip("|>&;") for word in words[: next(ends, len(words) - 1) + 1]]
        words = words if words[-1] else words[:-1]  # a sign of the shell stood alone
        # An ellipsis stands for an option's value, or for options that are left out.
        pairs = zip(["", *words], words, strict=False)
        try:
            parse(cli.cli, [w for left, w in pairs if w not in ("", "…") or left[:2] == "--"])
        except click.UsageError as error:
            wrong[said] = error.format_message()
    assert wrong == {}


def parse(group: click.Command, words: list[str]) -> None:
    """Parse, and run nothing; an OP or FILE that a sentence leaves out is no fault."""
    context = click.Context(group)
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        name, found, words = group.resolve_command(context, words)
        assert found is not None, name
        group, context = found, click.Context(found, info_name=name)
    with contextlib.suppress(
        click.MissingParameter, click.exceptions.NoArgsIsHelpError, click.exceptions.Exit
    ):  # Exit: --help, --version
        group.parse_args(context, words)


def test_commands_are_found_where_they_are() -> None:
    """The test above looks at something."""
    found = list(commands_in(README))
    assert "opkit align dsa --recorded" in found
    assert len(found) > 15
    with pytest.raises(click.UsageError):
        parse(cli.cli, ["trace", "kernels", "run.sqlite", "--sorted"])


def test_troubleshooting_quotes_what_opkit_says() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    said = {text for file in (ROOT / "opkit").rglob("*.py") for text in literals(file)}
    parts = [part for text in re.findall(r'"([^"]+)"', page) for part in text.split("…")]
    assert len(parts) > 40
    assert [part for part in parts if not any(part.strip() in whole for whole in said)] == []


def literals(file: Path) -> Iterator[str]:
    """The texts in a module, what is filled in as an ellipsis."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


WRONG = re.findall(
    r"^\| `(\w+)` \| [^|]+ \| ([^|]+) · ([^|]+) \| ([^|]+) \|$",
    (ROOT / "docs" / "verdict.md").read_text("utf-8"),
    flags=re.MULTILINE,
)


def test_all_wrong_mocks_are_told_of() -> None:
    there = sorted(path.name for path in (ROOT / "tests/traces/wrong").glob("*.gz"))
    assert sorted(f"{name}.sqlite.gz" for name, *_ in WRONG) == there


@pytest.mark.parametrize("name", ["eager", "norm_fp32", "zero_weights"])
def test_what_is_told_of_wrong_mocks(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (row,) = [row for row in WRONG if row[0] == name]
    traces = ROOT / "tests" / "traces"
    ran = run_main(
        capsys, monkeypatch, "align", "dsa", "--json", "--out", tmp_path,
        "--mock-trace", traces / "wrong" / f"{name}.sqlite.gz",
        "--e2e-trace", traces / "wrong-e2e.sqlite.gz",
    )  # fmt: skip
    failed = {
        phase: [check for check in found["checks"] if check["outcome"] == "fail"]
        for phase, found in json.loads(ran.out)["phases"].items()
    }
    context, generation = ([c["check"] for c in failed[p]] for p in ("context", "generation"))
    told = row[2].replace("the same", row[1]).split(", ")
    assert [context or ["none"], sorted(generation)] == [row[1].split(", "), sorted(told)]
    assert any(row[3].strip() in c["cause"] for checks in failed.values() for c in checks)
