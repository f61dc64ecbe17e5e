"""Kernel names: taken apart as a reader would, and told apart where two kernels differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_names import REAL

from opkit.align.match import name_level
from opkit.align.result import Level
from opkit.errors import BadInput
from opkit.nsys_parsers.names import load_families, parse_name

LOADS = "TrivialOffsetCalculator<(int)1, unsigned int>, at::native::memory::LoadWithCast<(int)1>"
COPY = "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase &)::[lambda() (instance 3)]"


def copy_of(kind: str, instance: int) -> str:
    """torch's cast of another element type, as nsys demangles it."""
    call = f"::operator ()() const::[lambda() (instance {instance})]::operator ()() const"
    return (
        f"void at::native::unrolled_elementwise_kernel<{COPY}{call}::[lambda({kind}) (instance 1)]"
        f", std::array<char *, (unsigned long)2>, (int)4, {LOADS}>(int, T1, T2)"
    )


def cat_of(size: int, dims: int) -> str:
    opaque = f"at::native::<unnamed>::OpaqueType<(unsigned int){size}>"
    return (
        f"void at::native::<unnamed>::CatArrayBatchedCopy<{opaque}, unsigned int, (int){dims}, "
        "(int)64, (int)64>(T1 *, int, T2)"
    )


def cutlass(tile: int, kernel: str, dtype: str) -> str:
    return (
        f"void cutlass::device_kernel<cutlass::gemm::kernel::{kernel}<cute::tuple<int, int>, "
        f"cutlass::gemm::Collective<cute::C<(int){tile}>, cutlass::{dtype}, void>>>(T1::Params)"
    )


@pytest.mark.parametrize("row", REAL, ids=[row["short"][:40] for row in REAL])
def test_real_names(row: dict[str, str]) -> None:
    name = parse_name(row["demangled"])
    assert (name.short, name.family) == (row["short"], row["family"])
    assert name.glue == (row["glue"] == "glue")
    assert name.dtypes == tuple(row["dtypes"].split())


def test_the_table_of_real_names_is_whole() -> None:
    assert len(REAL) == 47
    assert {row["glue"] for row in REAL} == {"glue", "no"}


def test_real_names_are_told_apart() -> None:
    names = [parse_name(row["demangled"]) for row in REAL]
    wrong = [
        (a.short, b.short)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        if name_level(a, b) is not None
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("one", "other", "level"),
    [
        # The same kernel with another tile, stage or integer argument.
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT",
         Level.VARIANT),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNT",
         Level.VARIANT),
        ("ampere_sgemm_128x64_tn", "ampere_sgemm_32x32_sliced1x4_tn", Level.VARIANT),
        ("void vllm::rms_norm_kernel<c10::BFloat16, (int)8, (int)2>(T1 *)",
         "void vllm::rms_norm_kernel<c10::BFloat16, (int)4, (int)2>(T1 *)", Level.VARIANT),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(64, "GemmUniversal", "bfloat16_t"),
         Level.VARIANT),
        (cat_of(2, 3), cat_of(2, 2), Level.VARIANT),
        ("triton_poi_fused_add_mul_3", "triton_poi_fused_add_mul_12", Level.VARIANT),
        # The same kernel with other element types.
        ("nvjet_sm90_tst_256x128_64x4_TNT", "nvjet_sm90_qqtst_256x128_64x4_TNT", Level.DTYPE),
        ("void vllm::rms_norm_kernel<c10::BFloat16, (int)8>(T1 *)",
         "void vllm::rms_norm_kernel<float, (int)8>(T1 *)", Level.DTYPE),
        ("void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::D)0>(T1 *)",
         "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, unsigned char, (vllm::D)1>(T1 *)",
         Level.DTYPE),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(128, "GemmUniversal", "half_t"),
         Level.DTYPE),
        (cat_of(2, 3), cat_of(4, 3), Level.DTYPE),
        (copy_of("float", 7), copy_of("c10::BFloat16", 12), Level.DTYPE),
        # Other kernels.
        (copy_of("int", 3), copy_of("long", 4), None),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(128, "ConvUniversal", "bfloat16_t"),
         None),
        ("void at::native::vectorized_elementwise_kernel<(int)4, at::native::MulFunctor<int>>(T1)",
         "void at::native::vectorized_elementwise_kernel<(int)4, at::native::AddFunctor<int>>(T1)",
         None),
        ("[memcpy DtoD]", "[memcpy HtoD]", None),
        ("[memset]", "[memcpy DtoD]", None),
        ("ampere_sgemm_128x64_tn", "ampere_hgemm_128x64_tn", None),
    ],
)  # fmt: skip
def test_levels(one: str, other: str, level: Level | None) -> None:
    assert name_level(parse_name(one), parse_name(other)) == level
    assert name_level(parse_name(other), parse_name(one)) == level
    assert name_level(parse_name(one), parse_name(one)) is Level.SAME


@pytest.mark.parametrize(
    ("name", "short", "family"),
    [
        (cutlass(128, "GemmUniversal", "half_t"), "GemmUniversal", "cutlass"),
        ("void flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<(int)2>>(T1::Params)",
         "FlashAttnFwdSm90", "flashattn"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<(unsigned long)4096>)",
         "ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "nccl"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>(float*, int)",
         "cunn_SoftMaxForward", "other"),
        ("void k<&operator==, 3>()", "k", "other"),
        ("<unnamed kernel>", "<unnamed kernel>", "other"),
    ],
)  # fmt: skip
def test_forms_of_names(name: str, short: str, family: str) -> None:
    assert (parse_name(name).short, parse_name(name).family) == (short, family)


@given(st.text(alphabet="ab:<>()[]{}, *&01", min_size=1, max_size=40))
def test_any_text_is_taken_apart(text: str) -> None:
    name = parse_name(text)
    assert name.demangled == text
    assert name.short or not text.strip()
    assert name_level(name, name) is Level.SAME


def test_a_users_rows_come_first(tmp_path: Path) -> None:
    extra = tmp_path / "families.toml"
    extra.write_text('[[family]]\nfamily = "mine"\npattern = "^nvjet_"\nglue = true\n')
    mine = parse_name("nvjet_sm90_tst_64x8_TNT", load_families(extra))
    assert (mine.family, mine.glue) == ("mine", True)
    assert parse_name("ampere_sgemm_128x64_tn", load_families(extra)).family == "gemm"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("family = [", "not a readable families file"),
        ('[[family]]\nfamily = "x"\n', "bad row"),
        ('[[family]]\nfamily = "x"\npattern = "("\n', "bad row"),
        ('[[family]]\nfamily = "x"\npattern = 3\n', "bad row"),
    ],
)
def test_a_bad_family_file_is_refused(content: str, said: str, tmp_path: Path) -> None:
    extra = tmp_path / "families.toml"
    extra.write_text(content)
    with pytest.raises(BadInput, match=said):
        load_families(extra)


def test_a_missing_family_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a readable families file"):
        load_families(tmp_path / "none.toml")
