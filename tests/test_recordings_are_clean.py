"""No recording in the repository tells of a machine or a person."""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path

import pytest

from opkit.nsys_parsers.private import find_private

ROOT = Path(__file__).parents[1]
RECORDINGS = sorted(
    path
    for folder in ("opkit/recorded", "tests/traces", "examples")
    for pattern in ("*.sqlite", "*.sqlite.gz")
    for path in (ROOT / folder).rglob(pattern)
)


def test_there_are_recordings_to_look_at() -> None:
    assert len(RECORDINGS) >= 22  # the true pair, process start, strict, fourteen wrong mocks


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_recording_is_clean(recording: Path) -> None:
    assert find_private(recording) == []


PLANTED = {
    "absolute path": "opened /home/alice/model/config.json",
    "environment variable": "AWS_SECRET_ACCESS_KEY=abcd",
    "IP address": "peer 192.168.7.20",
    "e-mail address": "mail to alice@example.org",
    "URL": "https://internal.example.org/x",
    "secret": "token hf_abcdefghijklmnopqrstuv",
    "host or user name": "ran on dgx-h100-04",
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_scanner_finds_what_was_planted(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "dirty.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE META_DATA_EXPORT (name TEXT, value TEXT)")
    db.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_HOST', 'dgx-h100-04')")
    db.execute("CREATE TABLE TARGET_INFO_GPU (name TEXT, uuid TEXT)")
    db.execute("INSERT INTO TARGET_INFO_GPU VALUES ('NVIDIA H100', '4df873bb-8bd4')")
    db.execute("CREATE TABLE NVTX_EVENTS (text TEXT)")
    db.executemany("INSERT INTO NVTX_EVENTS VALUES (?)", [(text,) for text in PLANTED.values()])
    db.execute("CREATE TABLE ThreadNames (nameId INTEGER)")
    db.execute("INSERT INTO ThreadNames VALUES (1)")
    db.commit()
    db.close()
    if packed:
        path = path.with_suffix(".sqlite.gz")
        path.write_bytes(gzip.compress((tmp_path / "dirty.sqlite").read_bytes()))

    found = find_private(path)

    for kind in PLANTED:
        assert any(line.startswith(f"NVTX_EVENTS.text: {kind} ") for line in found), kind
    assert "ThreadNames: 1 rows that describe the machine" in found
    assert any(line.startswith("TARGET_INFO_GPU.uuid") for line in found)
    assert any(line.startswith("META_DATA_EXPORT.EXPORT_HOST") for line in found)
