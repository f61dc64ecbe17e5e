"""From options to a backend, and prompts through a tokenizer."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_world import options

from opkit.bench.backends import make
from opkit.bench.backends.openai_url import OpenAiUrl
from opkit.bench.prompts import encoded
from opkit.errors import BadInput, ToolMissing


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a Child would have been made with."""
    made: list[Any] = []
    monkeypatch.setattr(make, "Child", lambda *args, **kwargs: made.append((args, kwargs)))
    for name in make.LOG_LEVEL_OF:
        monkeypatch.delenv(name, raising=False)
    return made


def test_an_offline_engine(child: list[Any], tmp_path: Path) -> None:
    asked = options(
        python="/py", engine_args={"a": 1}, start_limit_s=5.0, limit_s=6.0, log_level="info"
    )
    make.make_backend(asked, tmp_path)
    assert child == [
        (
            ("vllm", "/py", {"model": "m", "engine_dir": "", "engine_args": {"a": 1}},
             tmp_path / "engine.log"),
            {"env": {"VLLM_LOGGING_LEVEL": "INFO", "TLLM_LOG_LEVEL": "INFO"},
             "start_limit_s": 5.0, "limit_s": 6.0},
        )
    ]  # fmt: skip


def test_the_user_s_own_log_level_wins(
    child: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    make.make_backend(options(), tmp_path)
    assert child[0][1]["env"] == {"TLLM_LOG_LEVEL": "WARNING"}


def test_a_built_engine(child: list[Any], tmp_path: Path) -> None:
    make.make_backend(options(backend="trtllm", model="", engine_dir=Path("e")), tmp_path)
    assert child[0][0][2] == {"model": "", "engine_dir": "e", "engine_args": {}}


def test_a_server_with_the_vocabulary_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 77}')
    asked = options(backend="openai-url", url="http://h:1", model=str(tmp_path))
    backend = make.make_backend(asked, tmp_path)
    assert isinstance(backend, OpenAiUrl)
    assert backend._vocab == 77


class Letters:
    """A tokenizer of single letters."""

    @staticmethod
    def from_file(path: str) -> Letters:
        if Path(path).read_text() == "broken":
            raise Exception("expected value at line 1")  # as the library does
        return Letters()

    def encode(self, text: str, *, add_special_tokens: bool) -> SimpleNamespace:
        assert add_special_tokens is False
        return SimpleNamespace(ids=[ord(letter) for letter in text])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Letters))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def test_words_through_a_tokenizer_have_the_length_asked_for(folder: Path) -> None:
    prompts = encoded(3, folder)
    assert [len(prompts("a", length)) for length in (1, 17, 1000)] == [1, 17, 1000]
    text = "".join(map(chr, prompts("a", 1000)))
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz ")
    assert prompts("a", 50) == encoded(3, folder)("a", 50)
    assert prompts("a", 50) != prompts("b", 50)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("broken")
    with pytest.raises(BadInput, match="is no tokenizer"):
        encoded(0, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="is not there"):
        encoded(0, folder)


def test_no_tokenizers_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ToolMissing, match="tokenizers is not installed"):
        encoded(0, tmp_path)
