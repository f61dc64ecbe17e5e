"""Every command has `--json`, and what it prints is one object with a versioned schema."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_runs import command, run_main
from made_rows import about, grid

from opkit import cli
from opkit.collect.tables.write import write_tables
from opkit.layers.dsa import DSA
from opkit.layers.skeleton.new import REGISTRY

ROOT = Path(cli.__file__).parents[1]
RECORDED = ROOT / "opkit" / "recorded"
MOCK, E2E = (f"dsa-vllm-h100-{side}.sqlite.gz" for side in ("mock", "e2e"))


def leaves(name: str, found: click.Command) -> Iterator[tuple[str, click.Command]]:
    """The commands below a command that do something themselves."""
    if isinstance(found, click.Group):
        for below, child in found.commands.items():
            yield from leaves(f"{name} {below}", child)
    else:
        yield name, found


LEAVES = dict(leaf for name in cli.COMMANDS for leaf in leaves(name, command(name)))


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_every_command_has_json(name: str) -> None:
    options = [option for param in LEAVES[name].params for option in param.opts]
    assert "--json" in options


# What each prints of the bundled recording, a made collection, or nothing at all.
OFFLINE = [
    ("align dsa --recorded", "opkit.align/1"),
    ("align dsa --recorded --dry-run", "opkit.dry_run/1"),
    ("align dsa --e2e-cmd 'vllm serve m' --model made --dry-run", "opkit.dry_run/1"),
    ("status", "opkit.status/2"),
    ("report result.json", "opkit.align/1"),
    ("report dsa-vllm", "opkit.collection_report/1"),
    ("report --compare result.json other.json", "opkit.compare/1"),
    ("report --compare dsa-vllm again", "opkit.compare/1"),
    ("collect dsa --plan --tp 8", "opkit.plan_of_collection/1"),
    ("comm --plan --gpus 2", "opkit.comm-plan/1"),
    ("layers", "opkit.layers/1"),
    ("model list", "opkit.models/1"),
    ("model make deepseek-v32 --out model --no-weights", "opkit.model/1"),
    ("new norm_x --into checkout", "opkit.new/1"),
    ("trace summary e2e.sqlite.gz", "opkit.trace.summary/1"),
    ("trace kernels e2e.sqlite.gz", "opkit.trace.kernels/1"),
    ("trace steps e2e.sqlite.gz", "opkit.trace.steps/1"),
    ("trace modules e2e.sqlite.gz", "opkit.trace.modules/1"),
    ("trace sequence e2e.sqlite.gz --step 0", "opkit.trace.sequence/1"),
    ("trace diff e2e.sqlite.gz e2e.sqlite.gz", "opkit.trace.diff/1"),
    ("trace slim e2e.sqlite.gz slim.sqlite", "opkit.trace.slim/1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands above are given."""
    made = tmp_path_factory.mktemp("json")
    shutil.copy(RECORDED / E2E, made / "e2e.sqlite.gz")
    for name in ("opkit-out/collect/dsa-vllm", "again"):
        write_tables(DSA, grid(), about(), made / name / "tables")
    checkout = made / "checkout"
    (checkout / REGISTRY).parent.mkdir(parents=True)
    shutil.copy(ROOT / REGISTRY, checkout / REGISTRY)
    (checkout / "tests" / "layers").mkdir(parents=True)
    recorded = ROOT / "tests" / "traces" / "collected" / "dsa-h100-alignment.json.gz"
    shutil.copy(recorded, made / "result.json")  # gzipped, whatever it is called
    return made


@pytest.mark.parametrize(("words", "schema"), OFFLINE, ids=[words for words, _ in OFFLINE])
def test_json_is_one_object_with_its_schema(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    words: str,
    schema: str,
) -> None:
    monkeypatch.chdir(folder)
    if "other.json" in words:
        stored = run_main(capsys, monkeypatch, "report", "result.json", "--json").out
        (folder / "other.json").write_text(stored.replace('"0.24.0"', '"0.25.0"'))
    ran = run_main(capsys, monkeypatch, *shlex.split(words), "--json")
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["schema"] == schema
    assert re.fullmatch(r"opkit\.[a-z._-]+/\d+", schema)
