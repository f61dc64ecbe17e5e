"""The documents say what the program does: options, thresholds, exit codes, links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from cli_runs import command

from opkit import cli, errors
from opkit.align.policy import Policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CHECKS = (ROOT / "docs" / "checks.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["align", "collect"])
def test_every_option_is_in_the_readme(name: str) -> None:
    options = [option for param in command(name).params for option in param.opts]
    missing = [o for o in options if o.startswith("--") and not re.search(rf"`{o}\b", README)]
    assert missing == []


# Where a command's options are told, beside the README.
PAGES = {
    "bench": "bench.md",
    "check": "check.md",
    "comm": "comm.md",
    "doctor": "doctor.md",
    "install": "tables.md",
    "model": "models.md",
    "new": "new-op.md",
    "report": "report.md",
    "trace": "trace.md",
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
    page = PAGES.get(name)
    text = README + ((ROOT / "docs" / page).read_text("utf-8") if page else "")
    found = set(options_of(command(name)))
    assert {o for o in found if not re.search(rf"{o}(?![\w-])", text)} == set()


def test_every_page_is_linked_from_the_readme() -> None:
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"]({page}" not in README] == []


def test_every_exit_code_is_in_the_readme() -> None:
    codes = [value for name, value in vars(errors).items() if name.startswith("EXIT_")]
    assert [code for code in codes if f"\n| {code} | " not in README] == []


@pytest.mark.parametrize("key", [field.name for field in fields(Policy)])
def test_every_threshold_and_its_default_is_documented(key: str) -> None:
    row = re.search(rf"^\| `{key}` \| (\S+) \|", CHECKS, flags=re.MULTILINE)
    assert row is not None
    default = getattr(Policy(), key)
    shown = "none" if default == () else str(default).lower()
    assert row[1] == shown


@pytest.mark.parametrize(
    "path", ["README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(path: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / path).read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [t for t in targets if not ((ROOT / path).parent / t).exists()] == []
