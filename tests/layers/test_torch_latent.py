"""dsa and mla of plain torch against dense attention in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")

import torch_reference as reference  # noqa: E402
from torch_small import DEEPSEEK, SPARSE, YARN, build, context, generation, plan, run  # noqa: E402

from opkit.errors import BadInput  # noqa: E402
from opkit.layers.op import Case  # noqa: E402

# More tokens than the indexer picks (5), and fewer; with and without a past; both phases.
CASES = [
    context(1, 1),
    context(1, 4),
    context(1, 17),
    context(3, 9),
    context(2, 6, 7),
    context(2, 1, 11),
    generation(1, 1),
    generation(3, 4),
    generation(2, 20),
]
TIGHT = {"rtol": 0.0, "atol": 1e-12}


def expected(mock: Any, case: Case, *, sparse: bool) -> Any:
    """The new tokens' outputs, from whole requests computed anew."""
    length = case.past + case.tokens
    whole = mock.rows.rows(range(case.batch), 0, length).view(case.batch, length, -1)
    found = [reference.latent_attention(mock, request, sparse=sparse) for request in whole]
    return torch.cat([request[case.past :] for request in found])


@pytest.mark.parametrize("inputs", ["tokens", "normal"])
@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_sparse_attention_is_the_definitions(tmp_path: Path, case: Case, inputs: str) -> None:
    mock = build(plan(tmp_path, "dsa", SPARSE, case, inputs=inputs))
    torch.testing.assert_close(run(mock, case), expected(mock, case, sparse=True), **TIGHT)


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_latent_attention_is_the_definitions(tmp_path: Path, case: Case) -> None:
    mock = build(plan(tmp_path, "mla", DEEPSEEK, case))
    torch.testing.assert_close(run(mock, case), expected(mock, case, sparse=False), **TIGHT)


def test_the_indexer_decides(tmp_path: Path) -> None:
    case = context(1, 17)
    mock = build(plan(tmp_path, "dsa", SPARSE, case))
    dense = expected(mock, case, sparse=False)
    found = run(mock, case)
    torch.testing.assert_close(found[:5], dense[:5], **TIGHT)  # these see no more than it picks
    assert ((found[5:] - dense[5:]).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_who_picks_all_attends_as_mla_does(tmp_path: Path, case: Case) -> None:
    config = SPARSE | {"index_topk": 64}
    sparse = run(build(plan(tmp_path, "dsa", config, case)), case)
    dense = run(build(plan(tmp_path, "mla", config, case)), case)
    torch.testing.assert_close(sparse, dense, **TIGHT)


@pytest.mark.parametrize("op", ["dsa", "mla"])
@pytest.mark.parametrize("dtype", ["float64", "float32", None])
def test_generation_goes_on_where_context_ends(tmp_path: Path, op: str, dtype: Any) -> None:
    whole, chunk, step = context(2, 12), context(2, 5, 7), generation(2, 11)
    mock = build(plan(tmp_path, op, SPARSE, whole, chunk, step), dtype)
    outputs = [run(mock, case).view(2, case.tokens, -1) for case in (whole, chunk, step)]
    # bfloat16 keeps 8 bits, of sums over 48 products; the others leave what they round.
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[mock.dtype]
    assert outputs[0].abs().max() > 0.5
    torch.testing.assert_close(outputs[1], outputs[0][:, 7:], rtol=0.0, atol=close)
    torch.testing.assert_close(outputs[2], outputs[0][:, 11:], rtol=0.0, atol=close)


@pytest.mark.parametrize("case", [context(3, 40), generation(40, 30)], ids=Case.label)
def test_a_step_in_parts_is_the_step(
    tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opkit.layers.backends.torch import step

    made = plan(tmp_path, "dsa", SPARSE, case)
    whole = run(build(made), case)
    monkeypatch.setitem(step._TILE_BYTES, "cpu", 10_000)  # some tokens' worth
    mock = build(made)
    calls = []
    mock.module.indexer.score.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(mock, case), whole, **TIGHT)
    assert len(calls) > 3


@pytest.mark.parametrize("op", ["dsa", "mla"])
def test_pooled_caches_hold_one_request_for_all(tmp_path: Path, op: str) -> None:
    case = generation(3, 9)
    pooled = build(plan(tmp_path, op, SPARSE, case, caches="pooled"))
    run(pooled, case)
    prefilled = build(plan(tmp_path, op, SPARSE, case))
    run(prefilled, case)
    for view in pooled.probe().caches:
        slots = view.tensor.view(3, 10, -1)
        assert torch.equal(slots[0, :9], slots[1, :9])
        assert torch.equal(slots[0, :9], slots[2, :9])
        assert slots.abs().amax(dim=-1).min() > 0
    for one, other in zip(pooled.probe().caches, prefilled.probe().caches, strict=True):
        torch.testing.assert_close(one.tensor[:9], other.tensor[:9], **TIGHT)
        assert not torch.allclose(one.tensor[10:19], other.tensor[10:19])


def test_yarn_stretches_slow_pairs_and_sharpens_logits(tmp_path: Path) -> None:
    case = context(1, 60)
    plain = build(plan(tmp_path, "mla", DEEPSEEK, case))
    mock = build(plan(tmp_path, "mla", DEEPSEEK | {"rope_scaling": YARN}, case))
    ratio = mock.module.rope.logit_scale
    # As DeepSeek-V3's modeling_deepseek.py has it: mscale_all_dim sharpens the logits.
    assert ratio == pytest.approx((0.1 * 0.7 * math.log(4) + 1) ** 2)
    assert mock.module.scale == pytest.approx(plain.module.scale * ratio)
    grown = (0.1 * math.log(4) + 1) / (0.1 * 0.7 * math.log(4) + 1)  # by mscale over it
    rope = mock.module.rope
    assert (rope.cos**2 + rope.sin**2).sqrt()[5].tolist() == pytest.approx([grown] * 4)
    angles = torch.atan2(rope.sin[1], rope.cos[1])
    before = torch.tensor([10000.0 ** (-pair / 4) for pair in range(4)], dtype=torch.float64)
    # Pair 0 turns 5.1 times in 32 positions, pair 1 0.5 times: the ramp runs from 0 to 1.
    assert (before / angles).tolist() == pytest.approx([1.0, 4.0, 4.0, 4.0])
    assert not torch.allclose(run(mock, case), run(plain, case))


def test_yarn_of_deepseek_v3_blends_between_pairs_10_and_23() -> None:
    from opkit.layers.backends.torch.rope import Rope

    # Of its 32 pairs, 32 turns in 4,096 positions lie at pair 10.5, one turn at pair 22.5.
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    sizes = (64, 10000.0, 2)
    cpu, exact = torch.device("cpu"), torch.float64
    plain, stretched = (Rope(*sizes, given, cpu, exact) for given in (None, scaling))
    ratios = torch.atan2(plain.sin[1], plain.cos[1]) / torch.atan2(
        stretched.sin[1], stretched.cos[1]
    )
    expected = [1 / ((1 - slow) + slow / 40) for slow in (0, 1 / 13, 6 / 13, 12 / 13, 1)]
    assert ratios[[10, 11, 16, 22, 23]].tolist() == pytest.approx(expected)
    assert ratios[:10].tolist() == pytest.approx([1.0] * 10)
    assert ratios[24:].tolist() == pytest.approx([40.0] * 8)


def test_a_long_past_is_written_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opkit.layers.backends.torch import mock as shared

    for case in (generation(3, 20), generation(7, 2)):
        made = plan(tmp_path, "dsa", SPARSE, case)
        whole = run(build(made), case)
        with monkeypatch.context() as patched:
            patched.setitem(shared._PREFILL_ROWS, "cpu", 6)
            torch.testing.assert_close(run(build(made), case), whole, **TIGHT)


def test_rope_that_is_not_known_is_refused(tmp_path: Path) -> None:
    for scaling, reason in [
        ({"type": "linear", "factor": 2.0}, "type 'linear' is not known"),
        ({"type": "yarn", "factor": 2.0}, "needs original_max_position_embeddings above 0"),
    ]:
        made = plan(tmp_path, "mla", DEEPSEEK | {"rope_scaling": scaling}, context(1, 2))
        with pytest.raises(BadInput, match=reason):
            build(made)


def test_an_indexer_may_interleave_its_rope(tmp_path: Path) -> None:
    case = context(1, 30)
    config = SPARSE | {"architectures": ["GlmMoeDsaForCausalLM"]}
    outputs = [
        run(build(plan(tmp_path, "dsa", config | {"indexer_rope_interleave": flag}, case)), case)
        for flag in (False, True)
    ]
    assert not torch.allclose(outputs[0], outputs[1])


def test_a_rank_has_its_share_of_heads_and_the_whole_indexer(tmp_path: Path) -> None:
    case = context(1, 6)
    mock = build(plan(tmp_path, "dsa", SPARSE, case, tp_size=2))
    torch.testing.assert_close(run(mock, case), expected(mock, case, sparse=True), **TIGHT)
    described = mock.describe()
    assert (described.model["num_heads"], described.model["index_n_heads"]) == (2, 6)
    assert described.tp_size == 2
    assert any("tensor parallelism of 2 simulated" in note for note in described.notes)


def test_a_model_without_the_op_is_told_so(tmp_path: Path) -> None:
    from torch_small import LLAMA

    for op, config, reason in [
        ("dsa", DEEPSEEK, "no indexer"),
        ("dsa", LLAMA, "no latent attention"),
        ("mla", LLAMA, "no latent attention"),
        ("gqa", DEEPSEEK, "its attention is latent"),
        ("moe", LLAMA, "no experts"),
    ]:
        with pytest.raises(BadInput, match=reason):
            build(plan(tmp_path, op, config, context(1, 2)))
