"""The manifest: what goes in comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from opkit.errors import BadInput
from opkit.layers.manifest import Manifest, Operand, Wave, manifest_from_json, sidecar_of


def test_round_trip(tmp_path: Path) -> None:
    manifest = Manifest(
        side="mock",
        op="dsa",
        command=("python", "-m", "opkit.layers.drive"),
        model={"num_heads": 128},
        operands=(Operand("o_proj.weight", (7168, 16384), "bfloat16", 0.06, 0.0, 0.0),),
        waves=(Wave(4, 1024, 8),),
        notes=("strict",),
    )
    path = tmp_path / "m.json"
    manifest.write(path)
    assert manifest_from_json(path.read_text(), str(path)) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "opkit.manifest/1", "x": 1}'])
def test_nonsense_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput):
        manifest_from_json(text, "m.json")


def test_the_sidecar_stands_beside_the_report() -> None:
    assert sidecar_of(Path("a/mock.nsys-rep")) == Path("a/mock.opkit.json")
