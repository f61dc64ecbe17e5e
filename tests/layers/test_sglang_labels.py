"""Step labels in an SGLang server: a hook factory that hooks nothing."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opkit.layers.backends.sglang.labels import FORWARD_HOOKS, step_ranges


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to ranges and to the engine's own spans, in order."""
    events: list[str] = []

    @contextmanager
    def profile_range(name: str, *, color: str | None = None) -> Any:
        events.append(f"in {name} {color}")
        yield
        events.append("out")

    runner = ModuleType("sglang.srt.model_executor.model_runner")
    runner.__dict__.update(profile_range=profile_range, _build_step_span_name=lambda batch: batch)
    torch = SimpleNamespace(
        cuda=SimpleNamespace(
            nvtx=SimpleNamespace(
                range_push=lambda text: events.append(f"push {text}"),
                range_pop=lambda: events.append("pop"),
            )
        )
    )
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    for name in ("sglang", "sglang.srt", "sglang.srt.model_executor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, runner.__name__, runner)
    return events


def profile_range(name: str) -> Any:
    return sys.modules["sglang.srt.model_executor.model_runner"].profile_range(name, color="red")


def test_a_step_runs_in_a_range_of_its_name(told: list[str]) -> None:
    step_ranges({})
    with profile_range("step[DECODE bs=16]"):
        told.append("forward")
    step = "step[DECODE bs=16]"
    assert told == [f"push {step}", f"in {step} red", "forward", "out", "pop"]


def test_a_failed_step_closes_its_range(told: list[str]) -> None:
    step_ranges({})
    with pytest.raises(RuntimeError, match="out of memory"), profile_range("step[IDLE bs=0]"):
        raise RuntimeError("out of memory")
    assert told[-1] == "pop"


def test_no_module_is_hooked(told: list[str]) -> None:
    assert step_ranges({}) is None  # type: ignore[func-returns-value]
    assert told == []


def test_another_sglang_is_told_apart(told: list[str]) -> None:
    del told
    del sys.modules["sglang.srt.model_executor.model_runner"]._build_step_span_name
    with pytest.raises(AttributeError, match="_build_step_span_name"):
        step_ranges({})


def test_the_option_names_the_factory() -> None:
    (hook,) = json.loads(FORWARD_HOOKS)
    module, _, name = hook["hook_factory"].partition(":")
    # The server finds it in opkit's part for servers (test_opkit_in_server.py).
    assert (module, name) == ("opkit_in_server", step_ranges.__name__)
    assert hook["target_modules"]
