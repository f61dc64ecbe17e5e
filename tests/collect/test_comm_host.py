"""What is here: the probe of an interpreter, the variables that count, what becomes of keys."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from comm_bench import made_host

from opkit.collect.comm.host import inspect_host, manifest_of, variables
from opkit.collect.comm.plan import CommOptions
from opkit.errors import RunFailed, ToolMissing

HAS_TORCH = importlib.util.find_spec("torch") is not None


def interpreter(tmp_path: Path, script: str) -> str:
    """A program that stands in for Python."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(HAS_TORCH, reason="tells that torch is missing, and it is here")
def test_missing_torch_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="collectives need torch") as caught:
        inspect_host(CommOptions(out=tmp_path, device="cpu"))
    assert "--python" in str(caught.value.hint)


def test_a_missing_interpreter_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="cannot be started"):
        inspect_host(CommOptions(out=tmp_path, python=str(tmp_path / "none")))


def test_a_broken_interpreter_shows_its_last_lines(tmp_path: Path) -> None:
    python = interpreter(tmp_path, "echo broken libc >&2; exit 3")
    with pytest.raises(RunFailed, match="ended with code 3") as caught:
        inspect_host(CommOptions(out=tmp_path, python=python))
    assert caught.value.hint == "broken libc"


def test_the_probes_answer_is_found_among_a_frameworks_chatter(tmp_path: Path) -> None:
    answer = (
        '{"torch": "2.11.0", "cuda": "13.0", "nccl": "2.29.2", '
        '"gpus": [{"index": 0, "uuid": "GPU-x", "name": "H"}]}'
    )
    python = interpreter(tmp_path, f"echo INFO loading; echo 'opkit-probe: {answer}'; echo bye")
    host = inspect_host(CommOptions(out=tmp_path, python=python))
    assert host.versions == {"torch": "2.11.0", "cuda": "13.0", "nccl": "2.29.2"}
    assert host.device() == "H"
    assert host.version("nccl") == "2.29.2"


def test_this_opkit_does_not_come_before_an_interpreters_own_modules(tmp_path: Path) -> None:
    # Else a torch beside opkit would hide the one that --python was given for.
    python = interpreter(tmp_path, f'PYTHONPATH={tmp_path} exec "{sys.executable}" "$@"')
    (tmp_path / "torch.py").write_text("raise ImportError('the right one')")
    with pytest.raises(ToolMissing, match="the right one"):
        inspect_host(CommOptions(out=tmp_path, python=python, device="cpu"))


def test_variables_that_change_the_library_count_and_those_that_only_talk_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("NVSHMEM_DISABLE_NVLS", "1")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HOME_OF_SECRETS", "x")
    found = variables()
    assert found["NCCL_NVLS_ENABLE"] == "0"
    assert found["NVSHMEM_DISABLE_NVLS"] == "1"
    assert not {"NCCL_DEBUG", "HOME_OF_SECRETS"} & set(found)


def test_an_engine_beside_changes_nothing_for_nccl() -> None:
    with_engine = made_host()
    versions = {name: value for name, value in with_engine.versions.items() if name != "engine"}
    without = replace(with_engine, versions=versions)
    assert with_engine.subject("nccl") == without.subject("nccl")
    assert with_engine.subject("vllm")["versions"]["vllm"] == "0.24.0"
    assert manifest_of(with_engine, "vllm").versions["vllm"] == "0.24.0"
