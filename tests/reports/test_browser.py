"""The browser of the tests: missing, it skips by name, and fails where it must be there."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import REQUIRED, find_chromium, started


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OPKIT_CHROMIUM", raising=False)
    monkeypatch.delenv(REQUIRED, raising=False)


@pytest.mark.usefixtures("without")
def test_a_missing_browser_skips_and_says_why() -> None:
    with pytest.raises(pytest.skip.Exception, match="no Chromium on PATH"), started():
        pass


@pytest.mark.usefixtures("without")
def test_a_missing_browser_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(AssertionError, match="OPKIT_REQUIRE_BROWSER is set"), started():
        pass


@pytest.mark.usefixtures("without")
def test_a_named_browser_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPKIT_CHROMIUM", "/opt/own/chromium")
    assert find_chromium() == "/opt/own/chromium"
