"""``opkit model``: folders for mocks and servers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import click
import pytest
from cli_runs import command, run_main

from opkit import cli_model
from opkit.errors import EXIT_BAD_INPUT, EXIT_USAGE
from opkit.layers.checkpoint import bundled_models
from opkit.layers.geometry import read_geometry
from opkit.reports.parse_bar import ParseBar

DOCUMENT = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 3,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small Llama."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(bundled_models()["llama"] | SMALL))
    return file


Main = tuple[pytest.CaptureFixture[str], pytest.MonkeyPatch]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Main:
    """What ``run_main`` needs."""
    return capsys, monkeypatch


def test_list(main: Main) -> None:
    ran = run_main(*main, "model", "list")
    assert ran.code == 0
    for name, config in bundled_models().items():
        line = next(line for line in ran.out.splitlines() if line.startswith(f"{name} "))
        assert config["architectures"][0] in line
    found = json.loads(run_main(*main, "model", "list", "--json").out)
    assert [item["name"] for item in found["models"]] == list(bundled_models())


def test_make(main: Main, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    ran = run_main(*main, "model", "make", config, "--layers", 2, "--out", out)
    assert ran.code == 0
    assert ran.out.startswith(
        f"{out}: LlamaForCausalLM, 2 layers, 21 tensors of bfloat16 in 1 file"
    )
    geometry = read_geometry(out)
    assert (geometry.layers, geometry.hidden_size) == (2, 64)
    again = run_main(*main, "model", "make", config, "--out", out)
    assert again.code == EXIT_BAD_INPUT
    assert again.complaint() == f"{out} is there already"
    forced = run_main(*main, "model", "make", config, "--out", out, "--force", "--json")
    assert json.loads(forced.out)["layers"] == 3
    assert read_geometry(out).layers == 3


def test_how_much_is_written_is_said(
    main: Main, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines where stderr is no terminal; the clock ticks in steps of 3 s."""
    data = json.loads(config.read_text()) | {
        "hidden_size": 4000, "vocab_size": 37_500, "num_hidden_layers": 1,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 100,
    }  # fmt: skip
    config.write_text(json.dumps(data))

    def write(*_given: object, say: Callable[[str, float], None], **_more: object) -> None:
        for done in (0.25, 0.5, 1.0):
            say("model-00001-of-00001.safetensors", done)

    monkeypatch.setattr(cli_model, "write_checkpoint", write)
    monkeypatch.setattr(cli_model, "ParseBar", partial(ParseBar, clock=count(0.0, 3.0).__next__))
    ran = run_main(*main, "model", "make", config, "--out", tmp_path / "made")
    size = json.loads(run_main(*main, "model", "make", config, "--dry-run", "--json").out)["bytes"]
    assert size > 5e8
    file = "model-00001-of-00001.safetensors"
    assert ran.err.splitlines() == [
        f"   3.0 s  {file}: {0.25 * size / 1e9:.1f} of {size / 1e9:.1f} GB (25%)",
        f"   9.0 s  {file}: {size / 1e9:.1f} of {size / 1e9:.1f} GB (100%)",
    ]


def test_only_the_configuration(main: Main, tmp_path: Path) -> None:
    out = tmp_path / "made"
    ran = run_main(*main, "model", "make", "deepseek-v32", "--out", out, "--no-weights")
    assert ran.out == f"{out}: DeepseekV32ForCausalLM, 4 layers, no weights\n"
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert read_geometry(out).indexer is not None


def test_a_dry_run_lists_and_writes_nothing(main: Main, config: Path, tmp_path: Path) -> None:
    ran = run_main(*main, "model", "make", config, "--dry-run", "--layers", 1)
    lines = ran.out.splitlines()
    assert lines[0].split() == ["model.embed_tokens.weight", "128", "×", "64", "16,384", "bytes"]
    sizes = [int(line.split()[-2].replace(",", "")) for line in lines[:-1]]
    found = json.loads(run_main(*main, "model", "make", config, "--dry-run", "--layers", 1,
                                "--json").out)  # fmt: skip
    assert sum(sizes) == found["bytes"]
    assert len(sizes) == len(found["tensors"]) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_wrong_usage(main: Main, config: Path) -> None:
    ran = run_main(*main, "model", "make", config)
    assert ran.code == EXIT_USAGE
    assert "--out is missing" in ran.complaint()
    ran = run_main(*main, "model", "make", "gpt-5", "--dry-run")
    assert ran.code == EXIT_BAD_INPUT
    assert ran.complaint() == "gpt-5: no such configuration"


def test_every_option_is_documented() -> None:
    group = command("model")
    assert isinstance(group, click.Group)
    options = [option for part in group.commands.values() for param in part.params
               for option in param.opts]  # fmt: skip
    assert [o for o in options if o.startswith("--") and f"`{o}" not in DOCUMENT] == []
