"""Kernel names: taken apart as a reader would, and told apart where two kernels differ."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from importlib import resources
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_names import NAMES, REAL

from opkit.align.match import name_level
from opkit.align.result import Level
from opkit.errors import BadInput
from opkit.nsys_parsers.names import load_families, parse_name

DOCS = Path(__file__).parents[2] / "docs" / "names.md"
TABLE = tomllib.loads(
    resources.files("opkit.nsys_parsers").joinpath("families.toml").read_text("utf-8")
)["family"]
FAMILIES = {row["family"] for row in TABLE}

LOADS = "TrivialOffsetCalculator<(int)1, unsigned int>, at::native::memory::LoadWithCast<(int)1>"
COPY = "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase &)::[lambda() (instance 3)]"
SPLIT = "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize{}_stage3_warpsize2x2x1_ffma_{}"


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


def act(function: str, kind: str = "c10::BFloat16") -> str:
    """vLLM's gated activation, as nsys demangles it."""
    return (
        f"void vllm::act_and_mul_kernel<{kind}, __nv_bfloat162, &vllm::{function}<{kind}>, "
        f"&vllm::packed_{function}<__nv_bfloat162>, (bool)1>(T1 *, const T1 *, int)"
    )


def scan(op: str, items: int = 4) -> str:
    policy = f"cub::detail::scan::policy_hub<int, (int){items}>::Policy1000"
    return f"void cub::CUB_300001_SM_900::detail::scan::DeviceScanKernel<{policy}, {op}>(T2, T3)"


@pytest.mark.parametrize("row", REAL, ids=[row["short"][:40] for row in REAL])
def test_real_names(row: dict[str, str]) -> None:
    name = parse_name(row["demangled"])
    assert (name.short, name.family) == (row["short"], row["family"])
    assert name.glue == (row["glue"] == "glue")
    assert name.dtypes == tuple(row["dtypes"].split())


def test_the_table_of_real_names_is_whole() -> None:
    assert len(REAL) == 654
    assert {row["glue"] for row in REAL} == {"glue", "no"}
    assert all(row["origin"] for row in REAL)
    assert {row["family"] for row in REAL} == FAMILIES | {"other"}
    assert NAMES["act_and_mul_kernel"] == NAMES["act_and_mul_kernel(silu_kernel)"]


def test_real_names_are_told_apart() -> None:
    names = [parse_name(row["demangled"]) for row in REAL]
    assert [(a.short, b.short) for a, b in combinations(names, 2) if name_level(a, b)] == []


@pytest.mark.parametrize(
    ("one", "other", "level"),
    [
        # The same kernel with another tile, stage or integer argument.
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT",
         Level.VARIANT),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNT",
         Level.VARIANT),
        ("ampere_sgemm_128x64_tn", "ampere_sgemm_32x32_sliced1x4_tn", Level.VARIANT),
        (SPLIT.format("64x256x8", "kernel"), SPLIT.format("32x32x8", "kernel"), Level.VARIANT),
        ("void vllm::rms_norm_kernel<c10::BFloat16, (int)8, (int)2>(T1 *)",
         "void vllm::rms_norm_kernel<c10::BFloat16, (int)4, (int)2>(T1 *)", Level.VARIANT),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(64, "GemmUniversal", "bfloat16_t"),
         Level.VARIANT),
        (cat_of(2, 3), cat_of(2, 2), Level.VARIANT),
        (scan("std::plus<int>"), scan("std::plus<int>", 8), Level.VARIANT),
        ("triton_poi_fused_add_mul_3", "triton_poi_fused_add_mul_12", Level.VARIANT),
        ("bmm_E4m3_E4m3E4m3_Fp32_t128x32x256u2_s5_et128x32_m128x32x32_c1x1x1_rM_TN_schedS_sm100f",
         "bmm_E4m3_E4m3E4m3_Fp32_t128x8x512u2_s3_et128x8_m128x8x32_c1x1x2_rM_splitK2_TN_sm100f",
         Level.VARIANT),
        # The same kernel with other element types.
        ("nvjet_sm90_tst_256x128_64x4_TNT", "nvjet_sm90_qqtst_256x128_64x4_TNT", Level.DTYPE),
        ("void vllm::rms_norm_kernel<c10::BFloat16, (int)8>(T1 *)",
         "void vllm::rms_norm_kernel<float, (int)8>(T1 *)", Level.DTYPE),
        ("void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::D)0>(T1 *)",
         "void vllm::concat_and_cache_mla_kernel<__nv_bfloat16, unsigned char, (vllm::D)1>(T1 *)",
         Level.DTYPE),
        ("void q<cutlass::float_e2m1_t, (int)8>(T1)", "void q<cutlass::float_e4m3_t, (int)8>(T1)",
         Level.DTYPE),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(128, "GemmUniversal", "half_t"),
         Level.DTYPE),
        (cat_of(2, 3), cat_of(4, 3), Level.DTYPE),
        (copy_of("float", 7), copy_of("c10::BFloat16", 12), Level.DTYPE),
        (act("silu_kernel"), act("silu_kernel", "c10::Half"), Level.DTYPE),
        # Other kernels.
        (copy_of("int", 3), copy_of("long", 4), None),
        (cutlass(128, "GemmUniversal", "bfloat16_t"), cutlass(128, "ConvUniversal", "bfloat16_t"),
         None),
        ("void at::native::vectorized_elementwise_kernel<(int)4, at::native::MulFunctor<int>>(T1)",
         "void at::native::vectorized_elementwise_kernel<(int)4, at::native::AddFunctor<int>>(T1)",
         None),
        (act("silu_kernel"), act("gelu_kernel"), None),
        (scan("std::plus<int>"), scan("cuda::std::maximum<int>"), None),
        ("void ns::apply<int, ns::f(int)::[lambda(int) (instance 1)]>(T1)",
         "void ns::apply<int, ns::g(int)::[lambda(int) (instance 1)]>(T1)", None),
        ("[memcpy DtoD]", "[memcpy HtoD]", None),
        ("[memset]", "[memcpy DtoD]", None),
        ("ampere_sgemm_128x64_tn", "ampere_hgemm_128x64_tn", None),
        # A product and the kernel that sums its parts; an epilogue; another stage of an algorithm.
        (SPLIT.format("64x256x8", "kernel"), SPLIT.format("64x256x8", "split_k_kernel"), None),
        (SPLIT.format("64x256x8", "kernel"), SPLIT.format("64x256x8", "bias_f32_gelu"), None),
        ("_fwd_kernel_stage_1", "_fwd_kernel_stage_2", None),
        # Left mangled, template arguments are not read: they have to be the same.
        ("_ZN4vllm8rms_normILi8EfEEvPT0_", "_ZN4vllm8rms_normILi4EfEEvPT0_", None),
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
        (act("silu_kernel"), "act_and_mul_kernel(silu_kernel)", "activation"),
        ("void act_and_mul_kernel<float, &(float ns::gelu<float>(float const&))>(float*)",
         "act_and_mul_kernel(gelu)", "activation"),
        (scan("std::plus<int>"), "DeviceScanKernel(plus)", "cub"),
        ("void deep_ep::internode_ll::combine<(int)7>(void *)", "internode_ll::combine", "deepep"),
        ("void a::<unnamed>::detail::kernel<int>(T1)", "a::kernel", "other"),
        ("void a::b<int>::run<float>(T1) [clone .kd]", "b::run", "other"),
        ("void f(int)::local<3>(int)", "f(int)::local", "other"),
        ("void k<&operator==, 3>()", "k(operator==)", "other"),
        ("void k<(8 > 0), (ns::f<1> >> 2)>(int)", "k", "other"),
        ("std::enable_if<T2>(int)0&&std::is_same<T1, void>::value, void>::type vllm::k<T1>(T1 *)",
         "vllm::k", "vllm"),
        ("std::enable_if<((8)>(0))&&(true), void>::type ns::k<c10::Half, 8>(c10::Half*)",
         "ns::k", "other"),
        ("void __cdecl `anonymous namespace'::k<struct A,4>(float * __ptr64)", "k", "other"),
        ("<unnamed kernel>", "<unnamed kernel>", "other"),
        ("solve_poisson", "solve_poisson", "other"),
        ("_ZN4vllm15rms_norm_kernelIfEEvPT_", "rms_norm_kernel", "norm"),
        ("_ZN12_GLOBAL__N_13addEPf", "add", "other"),
        ("_Z9my_kernelPfi", "my_kernel", "other"),
        ("_Z", "_Z", "other"),
        ("_Z9999x", "x", "other"),
        ("", "(no name)", "other"),
        (" \n", "(no name)", "other"),
        ("a\nb\0", "a?b?", "other"),
        ("k" * 10_000, "k" * 120 + "…" + "k" * 39, "other"),
    ],
)  # fmt: skip
def test_forms_of_names(name: str, short: str, family: str) -> None:
    assert (parse_name(name).short, parse_name(name).family) == (short, family)


@pytest.mark.parametrize(
    "spellings",
    [
        ("void vllm::rms_norm_kernel<c10::BFloat16, (int)8, (bool)1>(T1 *, const T1 *)",
         "void vllm::rms_norm_kernel<c10::BFloat16, 8, true>(c10::BFloat16*, c10::BFloat16 const*)",
         "void __cdecl vllm::rms_norm_kernel<struct c10::BFloat16,8,1>(struct c10::BFloat16 *)"),
        ("void at::native::<unnamed>::cunn_SoftMaxForward<(int)8, float>(T2 *)",
         "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>(float*)",
         "void at::native::{anonymous}::cunn_SoftMaxForward<8, float>(float*)",
         "void at::native::_GLOBAL__N__ab12_3_x_cu_9f::cunn_SoftMaxForward<8, float>(float*)"),
        ("void cub::detail::EmptyKernel<void>()", "void cub::CUB_300001_SM_900::detail::EmptyKernel"
         "<void>()", "void cub::_V_300400_SM_750_800::detail::EmptyKernel<void>()"),
        (act("silu_kernel"),
         "void vllm::act_and_mul_kernel<c10::BFloat16, __nv_bfloat162, &(c10::BFloat16 "
         "vllm::silu_kernel<c10::BFloat16>(c10::BFloat16 const&)), &(__nv_bfloat162 "
         "vllm::packed_silu_kernel<__nv_bfloat162>(__nv_bfloat162 const&)), true>(int)"),
    ],
)  # fmt: skip
def test_every_demangler_spells_the_same_kernel(spellings: tuple[str, ...]) -> None:
    names = [parse_name(spelling) for spelling in spellings]
    assert len({(name.short, name.family, name.stem) for name in names}) == 1


@pytest.mark.parametrize(
    "name",
    [
        # Each of these carries arithmetic of the layer, or may: none is glue.
        "void at::native::_scatter_gather_elementwise_kernel<(int)128, (int)8, (int)0>(T1)",
        "void topk_transform_prefill_kernel<(int)512>(float *)",
        "_flash_prefill_kernel",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_poi_fused__to_copy_add_mul_silu_2",
        "void at::native::<unnamed>::distribution_elementwise_grid_stride_kernel<float>(int)",
        "void at::native::<unnamed>::convert_indices_from_coo_to_csr_cuda_kernel<int>(int)",
        "fused_elementwise_gate_kernel", "scaled_copy_kernel", "quantizing_cast_kernel",
    ],
)  # fmt: skip
def test_nothing_that_computes_is_glue(name: str) -> None:
    assert not parse_name(name).glue


def test_torchs_scatter_is_no_cache_write() -> None:
    scatter = "void at::native::_scatter_gather_elementwise_kernel<(int)128, (int)8>(int, T3)"
    assert parse_name(scatter).family == "index"


def test_only_collectives_communicate() -> None:
    told = {row["family"] for row in REAL if parse_name(row["demangled"]).communication}
    assert told == {"nccl", "all-reduce"}


@given(st.text() | st.text(alphabet="ab_:<>()[]{}, *&01-=Z", max_size=60))
def test_any_text_is_a_name(text: str) -> None:
    name = parse_name(text)
    assert name.demangled == text
    assert name.short.strip()
    assert name.short.isprintable()
    assert len(name.short) <= 160
    assert name == parse_name.__wrapped__(text)
    assert name_level(name, name) is Level.SAME


def steps(work: Callable[[], Any]) -> int:
    """How many lines of Python run in ``names.py``."""
    count = 0

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line if frame.f_code.co_filename.endswith("names.py") else None

    sys.settrace(line)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


HOSTILE = [
    "<", "(", ">", "()", "<>", "()::", "<()>", "<(", "[<({", "cutlass::device_kernel<", "a::",
    "_kernel_agent<", "operator<", "&a ", "(int)4,", "a>::type ", ", ", "{lambda(int)#1}<", "{(}",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_work_grows_with_the_length_and_no_faster(piece: str) -> None:
    short, long = ("x" + piece * n for n in (1_000, 4_000))
    assert steps(lambda: parse_name(long)) < 5 * steps(lambda: parse_name(short)) + 500


@pytest.mark.parametrize(
    "piece",
    [*HOSTILE, "a", "1", "_", " ", "1x1_", "_ZN4vllm", "Li1111", "_to_copy_", "é", "fus", "T1<",
     "a_kernel ", "_INTERNAL_", "nvjet_1x1_", "sm80_xmma_gemm_bias_", "bmm_E4m3_s1_t1x1x1", "(a::",
     "kernel_cutlass_a", "std::plus<", "at::native::elementwise_kernel<Functor", "&int const* ",
     "gemm_", "kv", "scale_"],
)  # fmt: skip
def test_a_hostile_name_of_100_kb_is_taken_apart(piece: str) -> None:
    # What the table's regular expressions cost beside the steps above; a square law would hang.
    name = parse_name(piece * (100_000 // len(piece)))
    assert 0 < len(name.short) <= 160


def test_a_users_rows_come_first(tmp_path: Path) -> None:
    extra = tmp_path / "families.toml"
    extra.write_text(
        '[[family]]\nfamily = "mine"\npattern = "^nvjet_(sm[0-9]+)"\nglue = true\n'
        "short = 'J \\1'\n"
        '[[family]]\nfamily = "ours"\npattern = "^my_"\nlower = true\ndetail = "T([0-9])"\n'
        '[[family]]\nfamily = "told"\npattern = "^Apply"\ncomputes = "(Op[A-Z])"\n'
        '[[family]]\nfamily = "wrap"\npattern = "^Wrapper$"\nwrapper = true\n'
        '[[family]]\nfamily = "link"\npattern = "^Link"\ncommunication = true\n'
    )
    table = load_families(extra)
    mine = parse_name("nvjet_sm90_tst_64x8_TNT", table)
    assert (mine.family, mine.glue, mine.short) == ("mine", True, "J sm90")
    assert parse_name("ampere_sgemm_128x64_tn", table).family == "gemm"
    ours, theirs = (parse_name(f"void My_Kernel<T{n}, {n}>(int)", table) for n in (1, 2))
    assert (ours.family, ours.short, ours.stem) == ("ours", "My_Kernel(1)", theirs.stem)
    a, b = (parse_name(f"void Apply<Op{x}, 4>(int)", table) for x in "AB")
    assert (a.short, a.stem == b.stem) == ("Apply(OpA)", False)
    assert parse_name("void Wrapper<ns::rms_norm<int>, int>(int)", table).family == "norm"
    assert parse_name("void Wrapper<ns::unheard<int>, int>(int)", table).family == "wrap"
    assert parse_name("LinkUp", table).communication


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("family = [", "not a readable families file"),
        ('family = "x"', "holds [[family]] rows"),
        ("[[famly]]\nx = 1\n", "holds [[family]] rows"),
        ("family = [1]", "row 1: bad row"),
        ('[[family]]\nfamily = "x"\n', "row 1: bad row, it lacks pattern"),
        ('[[family]]\npattern = "x"\n', "row 1: bad row, it lacks family"),
        ('[[family]]\nfamily = "x"\npattern = "("\n', "row 1: bad row, pattern '(' is no regular"),
        ('[[family]]\nfamily = "x"\npattern = 3\n', "row 1: bad row, pattern is 3, not a text"),
        ('[[family]]\nfamily = "x"\npattern = ""\n', "row 1: bad row, pattern is ''"),
        ('[[family]]\nfamily = "x"\npattern = "y"\n' * 2 + "glue = 1\n",
         "row 2: bad row, glue is 1, not true or false"),
        ('[[family]]\nfamily = "x"\npatern = "y"\n', "row 1: bad row, unknown key 'patern'"),
        ('[[family]]\nfamily = "x"\npattern = "y"\nshort = "\\\\2"\n', "row 1: bad row, invalid"),
        ('[[family]]\nfamily = "x"\npattern = "y"\ndtype = "z"\n', "row 1: bad row, dtype 'z' has"),
        ('[[family]]\nfamily = "x"\npattern = "Y"\nlower = true\n', "row 1: bad row, lower is"),
    ],
)  # fmt: skip
def test_a_bad_family_file_is_refused(content: str, said: str, tmp_path: Path) -> None:
    extra = tmp_path / "families.toml"
    extra.write_text(content)
    with pytest.raises(BadInput, match=re.escape(said)) as refused:
        load_families(extra)
    assert str(extra) in str(refused.value)
    assert "\n" not in str(refused.value) or "readable" in said


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_missing_or_binary_family_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    extra = tmp_path / "families.toml"
    if content is not None:
        extra.write_bytes(content)
    with pytest.raises(BadInput, match="not a readable families file"):
        load_families(extra)


def test_the_docs_list_every_family_with_an_example_that_is_one() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| .*? \| `([^`]+)` \|$", DOCS.read_text("utf-8"), re.M)
    assert [parse_name(example).family for _, example in rows] == [family for family, _ in rows]
    assert sorted(family for family, _ in rows) == sorted(FAMILIES | {"other"})


def test_the_docs_name_every_key() -> None:
    used = {key for row in TABLE for key in row}
    told = set(re.findall(r"^\| `(\w+)` \| (?:text|regex|true)", DOCS.read_text("utf-8"), re.M))
    assert used <= told
