"""What a mock's large products were given, whichever way their modules are called. Needs torch."""

from __future__ import annotations

from typing import Any

import pytest

from opkit.layers.operands import dtype_name, sample, watch

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
nn = torch.nn

LARGE = 1024  # width from which a square weight counts as large


class Indexer(nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, q: Any, k: Any) -> Any:
        return q[0, 0] + k[0, 0]


class Op(nn.Module):  # type: ignore[misc, name-defined]
    """A large product called by position or by keyword, a small one, and an indexer."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.large = nn.Linear(LARGE, LARGE, bias=False)
        self.small = nn.Linear(LARGE, 4, bias=False)
        self.indexer = Indexer()
        self.keyword = keyword

    def forward(self, x: Any) -> Any:
        out = self.large(input=x) if self.keyword else self.large(x)
        self.indexer(x, out)
        return self.small(out)


class Fails(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(LARGE, LARGE)


def rows() -> Any:
    return torch.arange(3.0 * LARGE).reshape(3, LARGE)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_large_product_tells_its_weight_and_input(keyword: bool) -> None:
    torch.manual_seed(0)
    op = Op(keyword)
    found = watch(op, lambda: op(rows()), "context", {})
    assert found == (
        sample("large.weight", op.large.weight),
        sample("context large.input", rows()),
    )


def test_further_arguments_are_told_by_their_position() -> None:
    op = Op(keyword=True)
    found = watch(op, lambda: op(rows()), "generation", {"indexer": {"q": 0, "k": 1}})
    names = [operand.name for operand in found]
    assert names == [
        "large.weight", "generation large.input", "generation indexer.q", "generation indexer.k",
    ]  # fmt: skip
    assert found[2] == sample("generation indexer.q", rows())


def test_what_is_not_called_is_not_told() -> None:
    op = Op(keyword=False)
    assert watch(op, lambda: op.small(rows()), "context", {}) == ()


def test_hooks_go_also_when_the_forward_fails() -> None:
    op = Fails()

    def forward() -> None:
        op.large(torch.zeros(1, LARGE))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        watch(op, forward, "context", {})
    assert not op.large._forward_pre_hooks


def test_element_types_are_named_as_torch_writes_them() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
    assert sample("x", torch.zeros(2, 2, dtype=torch.bfloat16)).dtype == "bfloat16"
