"""Two kernel sequences side by side: nothing is lost, equal names meet, what moved shows twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opkit.align.match import Pairing, align_names, kernel_stat, match_regions
from opkit.align.policy import Policy, Role
from opkit.align.regions import Dim, Launch, Region
from opkit.align.result import Level
from opkit.layers.op import Case, Phase
from opkit.nsys_parsers.names import KernelName, parse_name

CASE = Case(Phase.CONTEXT, 1, 1024, 0)
# Letters stand for kernels; a and A are variants of one, b and B differ in element type.
KERNELS = {
    "a": "nvjet_sm90_tst_64x8_64x16_1x1_TNT",
    "A": "nvjet_sm90_tst_256x128_64x4_1x2_TNT",
    "b": "void vllm::rms_norm_kernel<c10::BFloat16, (int)8>(T1 *)",
    "B": "void vllm::rms_norm_kernel<float, (int)8>(T1 *)",
    "c": "void vllm::topKPerRowPrefill<(int)512>(const float *)",
    "C": "void vllm::cooperative::cooperative_topk_cs8<(unsigned int)2048>(T1)",
    "d": "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16>(const T1 *)",
    "-": "[memset]",
}
ROLE = Role(r"topKPerRow", r"cooperative_topk")
SAME, VARIANT, DTYPE = Level.SAME, Level.VARIANT, Level.DTYPE
MOCK, E2E = Level.MOCK_ONLY, Level.E2E_ONLY
words = st.text(alphabet="".join(KERNELS), max_size=9)


def names(word: str) -> list[KernelName]:
    return [parse_name(KERNELS[letter]) for letter in word]


def levels(mock: str, e2e: str, roles: Sequence[Role] = ()) -> list[Level]:
    return [level for *_, level in align_names(names(mock), names(e2e), roles)]


def worth(pairs: list[Pairing]) -> float:
    """What an alignment is worth, by the rule that match.py states."""
    each = {SAME: 4.0, VARIANT: 3.0, Level.ROLE: 2.5, DTYPE: 2.0, MOCK: -1.0, E2E: -1.0}
    return sum(each[level] for *_, level in pairs)


@given(words, words)
def test_every_kernel_of_both_sides_appears_once_and_in_order(mock: str, e2e: str) -> None:
    pairs = align_names(names(mock), names(e2e))
    assert [i for i, _, _ in pairs if i is not None] == list(range(len(mock)))
    assert [j for _, j, _ in pairs if j is not None] == list(range(len(e2e)))
    for i, j, level in pairs:
        assert (level is MOCK) == (j is None)
        assert (level is E2E) == (i is None)


@given(words)
def test_equal_sequences_are_the_same_throughout(word: str) -> None:
    assert levels(word, word) == [SAME] * len(word)


@given(words, words)
def test_an_alignment_is_worth_the_same_from_either_side(mock: str, e2e: str) -> None:
    there, back = (align_names(names(x), names(y)) for x, y in ((mock, e2e), (e2e, mock)))
    assert worth(there) == worth(back)
    assert worth(there) >= -len(mock) - len(e2e)


@given(words, words)
def test_only_equal_sequences_match_without_a_remark(mock: str, e2e: str) -> None:
    assert (set(levels(mock, e2e)) <= {SAME}) == (mock == e2e)


@given(words, st.integers(0, 8))
def test_a_dropped_kernel_is_the_only_difference(word: str, at: int) -> None:
    if at < len(word):
        found = levels(word[:at] + word[at + 1 :], word)
        assert found.count(E2E) == 1
        assert found.count(MOCK) == 0
        assert found.count(SAME) == len(word) - 1


@pytest.mark.parametrize(
    ("mock", "e2e", "wanted"),
    [
        ("", "", []),
        ("ab", "", [MOCK, MOCK]),
        ("", "ab", [E2E, E2E]),
        ("abc", "acd", [SAME, MOCK, SAME, E2E]),
        ("abd", "Abd", [VARIANT, SAME, SAME]),
        ("abd", "aBd", [SAME, DTYPE, SAME]),
        ("acd", "aCd", [SAME, MOCK, E2E, SAME]),
        ("a-b", "ab", [SAME, MOCK, SAME]),
        ("aab", "ab", [MOCK, SAME, SAME]),  # a duplicate
        ("abcd", "acbd", [SAME, E2E, SAME, MOCK, SAME]),  # two that changed places
        ("aA", "Aa", [VARIANT, VARIANT]),
        ("aAb", "Ab", [MOCK, SAME, SAME]),  # the exact name wins where both are possible
        ("Aab", "Ab", [SAME, MOCK, SAME]),
    ],
)
def test_alignments(mock: str, e2e: str, wanted: list[Level]) -> None:
    # Where several alignments are worth the same, which one is found is a matter of taste.
    assert sorted(levels(mock, e2e)) == sorted(wanted)
    assert worth(align_names(names(mock), names(e2e))) == worth([(0, 0, x) for x in wanted])


def test_a_declared_role_pairs_in_its_direction_only() -> None:
    assert levels("acd", "aCd", [ROLE]) == [SAME, Level.ROLE, SAME]
    assert sorted(levels("aCd", "acd", [ROLE])) == sorted([SAME, MOCK, E2E, SAME])


def launch(
    letter: str, us: float, *, grid: Dim | None = (132, 1, 1), block: Dim | None = (256, 1, 1)
) -> Launch:
    return Launch(parse_name(KERNELS[letter]), 1_000, 1_000 + round(us * 1000), grid, block, False)


def region(*launches: Launch) -> Region:
    return Region(CASE, launches)


def test_statistics_of_one_place_over_all_regions() -> None:
    launches = [launch("a", us) for us in (10.0, 12.0, 11.0, 30.0)]
    made = kernel_stat(launches, [1_000, 600, 400, 0])
    assert made.offset_ns == 500
    assert (made.median_ns, made.min_ns, made.max_ns, made.mad_ns, made.calls) == (
        11_500, 10_000, 30_000, 1_000, 4,
    )  # fmt: skip
    assert (made.name, made.short, made.family) == (KERNELS["a"], KERNELS["a"], "nvjet")
    assert (made.grid, made.block) == ((132, 1, 1), (256, 1, 1))


def test_a_grid_that_differs_between_regions_is_no_grid() -> None:
    made = kernel_stat([launch("a", 1.0), launch("a", 1.0, grid=(64, 1, 1))], [1_000, 1_000])
    assert (made.grid, made.block) == (None, (256, 1, 1))


def test_matched_regions_carry_medians_shares_and_what_is_key() -> None:
    mock = [
        region(launch("a", 90.0), launch("-", 0.5)),
        region(launch("a", 92.0), launch("-", 0.7)),
    ]
    e2e = [region(launch("a", 98.0), launch("-", 2.0), launch("b", 0.2))]
    first, second, third = match_regions(mock, e2e, Policy())
    assert (first.mock and first.mock.median_ns, first.e2e and first.e2e.median_ns) == (
        91_000,
        98_000,
    )
    assert (first.level, first.key, first.glue) == (SAME, True, False)
    assert first.share == pytest.approx(91.0 / 91.6)  # of the side where it is larger
    # Glue is key from 1 % of the time on; another kernel whatever its time.
    assert (second.level, second.key, second.glue) == (SAME, True, True)
    assert second.share == pytest.approx(2.0 / 100.2)
    assert (third.level, third.key, third.glue, third.mock) == (E2E, True, False, None)
    assert third.share == pytest.approx(0.2 / 100.2)


def test_a_kernels_offset_counts_from_the_first_start_of_its_region() -> None:
    late = replace(launch("a", 5.0), start=9_000, end=14_000)
    early = replace(launch("b", 1.0), start=8_200, end=9_200)  # launched later, started first
    [pair, other] = match_regions([region(late, early)], [region(late, early)], Policy())
    assert pair.mock is not None
    assert other.mock is not None
    assert (pair.mock.offset_ns, other.mock.offset_ns) == (800, 0)


def test_glue_below_the_share_is_not_key() -> None:
    sides = [region(launch("a", 99.0), launch("-", 0.9))]
    _, fill = match_regions(sides, sides, Policy())
    assert (fill.key, fill.glue) == (False, True)
    _, fill = match_regions(sides, sides, Policy(key_share=0.005))
    assert (fill.key, fill.glue) == (True, True)
