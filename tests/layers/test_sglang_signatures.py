"""What opkit uses of SGLang is there in SGLang 0.5.14, as recorded from its sources."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import record_sglang

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "sglang-0.5.14.json").read_text("utf-8")
)
LAYERS = record_sglang.ROOT / "opkit" / "layers"
FILES = sorted([*LAYERS.glob("backends/sglang/*.py"), *LAYERS.glob("*/sglang.py")])
# Built through argparse or by attribute, not by their initialiser's parameters.
FREE = {"ServerArgs"}


def keywords(source: str, names: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Calls of imported names by a keyword: name and keyword."""
    return [
        (node.func.id, keyword.arg)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in names
        and node.func.id not in FREE
        for keyword in node.keywords
        if keyword.arg is not None
    ]


def test_every_import_is_recorded() -> None:
    used = {module: sorted(names) for module, names in record_sglang.used().items()}
    assert used == {module: sorted(names) for module, names in RECORDED["names"].items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(LAYERS).as_posix())
def test_calls_use_parameters_that_exist(file: Path) -> None:
    source = file.read_text()
    names = {
        name: RECORDED["names"][module][name]
        for module, imported in record_sglang.imports(source).items()
        for name in imported
    }
    # LayerRunner is ModelRunner with other graphs.
    names["LayerRunner"] = RECORDED["names"]["sglang.srt.model_executor.model_runner"][
        "ModelRunner"
    ]
    unknown = [call for call in keywords(source, names) if call[1] not in names[call[0]]]
    assert unknown == []


def test_calls_with_keywords_are_seen_at_all() -> None:
    calls = [
        call
        for file in FILES
        for call in keywords(
            file.read_text(), {"LayerRunner": [], "ScheduleBatch": [], "ReplicatedLinear": []}
        )
    ]
    assert ("LayerRunner", "nccl_port") in calls
    assert ("ScheduleBatch", "out_cache_loc") in calls
    assert ("ReplicatedLinear", "quant_config") in calls


@pytest.mark.parametrize("place", record_sglang.MEMBERS, ids=":".join)
def test_every_member_is_recorded(place: tuple[str, str]) -> None:
    path, owner = place
    assert RECORDED["members"][f"{path}:{owner}"] == sorted(record_sglang.MEMBERS[place])


def test_the_fake_takes_no_more_than_the_real_one() -> None:
    import dataclasses

    import fake_sglang

    real = set(RECORDED["names"]["sglang.srt.server_args"]["ServerArgs"])
    fake = {item.name for item in dataclasses.fields(fake_sglang.ServerArgs)}
    assert fake - real == {"refuse_me"}


def test_a_recording_finds_what_it_reads(tmp_path: Path) -> None:
    package = tmp_path / "sglang" / "srt"
    package.mkdir(parents=True)
    (package / "a.py").write_text("from sglang.srt.b import *\nfrom sglang.srt.b import old as new")
    (package / "b.py").write_text(
        "class C:\n    def __init__(self, x, *, y): self.z = x\nold = 1\n"
    )
    file, node = record_sglang.definition(tmp_path, "sglang.srt.a", "C")
    assert (file.name, record_sglang.parameters(node)) == ("b.py", ["x", "y"])
    assert "z" in record_sglang.members(file, "C")
    with pytest.raises(LookupError, match="has no D"):
        record_sglang.definition(tmp_path, "sglang.srt.b", "D")
