"""Ranges: which nsys records which, and what is said where they would be lost."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from opkit.errors import ToolMissing
from opkit.layers import nvtx

OLD, NEW = "2024.2.3.38-242334140272v0", "2025.3.1.90-253135822126v0"


@pytest.mark.parametrize(
    ("nsys", "package", "lost"),
    [
        (OLD, "0.2.11", False),  # measured
        (OLD, "0.2.12", True),  # measured
        (OLD, "0.2.17", True),  # measured
        (OLD, "0.2.8", False),
        (OLD, "1.0", True),
        (NEW, "0.2.17", False),
        ("2024.4.1", "0.2.12", False),
        ("2023.4.4", "0.2.12", True),
        (OLD, "", True),
        (NEW, "", True),
    ],
)
def test_which_nsys_records_which_package(nsys: str, package: str, lost: bool) -> None:
    problem = nvtx.recorded_problem(nsys, package)
    assert (problem is not None) is lost
    assert not lost or not package or (nsys in str(problem) and package in str(problem))


class Ranges:
    """Stands in for the package, and for torch's own ranges."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def push_range(self, text: str) -> None:
        self.events.append(text)

    def pop_range(self) -> None:
        self.events.append("pop")

    range_push, range_pop = push_range, pop_range


def torch_with(cuda: bool, ranges: Ranges | None = None) -> SimpleNamespace:
    return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: cuda, nvtx=ranges))


def never(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    ranges = Ranges()
    monkeypatch.setitem(sys.modules, "nvtx", ranges)
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: "0.2.11")
    monkeypatch.delenv(nvtx.NSYS_VERSION, raising=False)
    return ranges


def test_with_cuda_torch_writes_them_whatever_the_package_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(nvtx.NSYS_VERSION, OLD)
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: "0.2.17")
    ranges = Ranges()
    with nvtx.marker(torch_with(True, ranges), never)("a"):
        ranges.events.append("work")
    assert ranges.events == ["a", "work", "pop"]


def test_without_cuda_the_package_writes_them(package: Ranges) -> None:
    with nvtx.marker(torch_with(False), never)("a"):
        package.events.append("work")
    assert package.events == ["a", "work", "pop"]


def test_a_range_is_closed_when_its_work_fails(package: Ranges) -> None:
    marked = nvtx.marker(torch_with(False), never)
    with pytest.raises(ValueError, match="broken"), marked("a"):
        raise ValueError("broken")
    assert package.events == ["a", "pop"]


@pytest.mark.parametrize("installed", ["0.2.12", ""])
def test_a_watching_nsys_that_would_lose_them_is_refused(
    package: Ranges, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: installed)
    monkeypatch.setenv(nvtx.NSYS_VERSION, OLD)
    with pytest.raises(ToolMissing, match="this torch has no CUDA, and") as caught:
        nvtx.marker(torch_with(False), never)
    assert caught.value.hint == "pip install 'nvtx<=0.2.11'"
    assert package.events == []


def test_a_newer_nsys_records_a_newer_package(
    package: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: "0.2.17")
    monkeypatch.setenv(nvtx.NSYS_VERSION, NEW)
    with nvtx.marker(torch_with(False), never)("a"):
        pass
    assert package.events == ["a", "pop"]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("installed", ["0.2.12", ""])
def test_without_nsys_it_is_only_said(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(nvtx, "nvtx_version", lambda: installed)
    told: list[str] = []
    with nvtx.marker(torch_with(False), told.append)("a"):
        pass
    assert len(told) == 1
    assert "pip install 'nvtx<=0.2.11'" in told[0]


def test_the_installed_version_is_found_without_importing_it() -> None:
    before = set(sys.modules)
    version = nvtx.nvtx_version()
    assert version == "" or version[0].isdigit()
    assert "nvtx" not in set(sys.modules) - before
