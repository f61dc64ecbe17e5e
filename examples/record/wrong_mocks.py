"""Run a mock with one known fault, to record what opkit must catch.

    nsys profile … python examples/record/wrong_mocks.py FAULT PLAN.json

Each fault is a small change of the plan, or a patch of the vLLM mock from outside: the product has
no option for being wrong. The fault's name stands in the manifest's command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from opkit.errors import EXIT_USAGE, OpkitError
from opkit.layers import drive
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase, read_plan

Fault = Callable[[Plan], Plan]


def fp8_kv(plan: Plan) -> Plan:
    """Another quantisation: the KV cache in FP8."""
    return replace(plan, engine_args=(*plan.engine_args, "--kv-cache-dtype", "fp8"))


def eager(plan: Plan) -> Plan:
    """Generation launched kernel by kernel instead of replayed from a graph."""
    cases = tuple(
        replace(item, mode=LaunchMode.EAGER) if item.case.phase is Phase.GENERATION else item
        for item in plan.cases
    )
    return replace(plan, cases=cases)


def half_heads(plan: Plan) -> Plan:
    """Half of the attention heads, as if tensor parallelism were 2."""
    shape = json.loads((Path(plan.model) / "config.json").read_text())
    heads = {name: shape[name] // 2 for name in ("num_attention_heads", "num_key_value_heads")}
    return replace(plan, engine_args=(*plan.engine_args, "--hf-overrides", json.dumps(heads)))


def batch_labelled(plan: Plan) -> Plan:
    """Another batch size than the server's, and the label says so."""
    cases = tuple(replace(item, case=_other_batch(item.case)) for item in plan.cases)
    return replace(plan, cases=cases)


def batch(plan: Plan) -> Plan:
    """Another batch size than the label says."""
    from opkit.layers.dsa.vllm import DsaMock

    honest = DsaMock.prepare

    def prepare(self: DsaMock, planned: PlannedCase) -> Callable[[], None]:
        return honest(self, replace(planned, case=_other_batch(planned.case)))

    DsaMock.prepare = prepare  # type: ignore[method-assign]
    return plan


def no_indexer(plan: Plan) -> Plan:
    """The indexer is left out; attention reads the same first tokens for every query."""

    def change(model: Any) -> None:
        import torch

        attention = model.self_attn.mla_attn
        attention.skip_topk = True
        picked = attention.topk_indices_buffer
        picked.copy_(torch.arange(picked.shape[1], device=picked.device).expand_as(picked))

    return _after_load(plan, change)


def extra_elementwise(plan: Plan) -> Plan:
    """One elementwise kernel too many, in front of the module."""

    def change(model: Any) -> None:
        honest = model.self_attn.forward

        def forward(hidden_states: Any, **others: Any) -> Any:
            return honest(hidden_states=hidden_states * 1.0, **others)

        model.self_attn.forward = forward

    return _after_load(plan, change)


def norm_fp32(plan: Plan) -> Plan:
    """The latent norms in plain float32 operations instead of the engine's fused kernel."""

    def plain_norm(weight: Any, epsilon: float) -> Callable[[Any], Any]:
        def forward(latent: Any) -> Any:
            full = latent.float()
            scale = (full.pow(2).mean(dim=-1, keepdim=True) + epsilon).rsqrt()
            return (full * scale * weight.float()).to(latent.dtype)

        return forward

    def change(model: Any) -> None:
        for norm in (model.self_attn.q_a_layernorm, model.self_attn.kv_a_layernorm):
            norm._forward_method = plain_norm(norm.weight, norm.variance_epsilon)

    return _after_load(plan, change)


def split_fused(plan: Plan) -> Plan:
    """The fused projection to the latents, run as two GEMMs and a concatenation."""

    def change(model: Any) -> None:
        import torch

        attention = model.self_attn
        fused = attention.fused_qkv_a_proj
        cut = attention.q_lora_rank

        def forward(hidden: Any) -> Any:
            linear = torch.nn.functional.linear
            parts = (linear(hidden, fused.weight[:cut]), linear(hidden, fused.weight[cut:]))
            return torch.cat(parts, dim=-1), None

        fused.forward = forward

    return _after_load(plan, change)


def zero_activations(plan: Plan) -> Plan:
    """The module's input is all zeros."""
    return _inputs_changed(plan, lambda hidden: hidden.zero_())


def equal_rows(plan: Plan) -> Plan:
    """Every token's activations are the same."""
    return _inputs_changed(plan, lambda hidden: hidden[:1].expand_as(hidden))


def zero_weights(plan: Plan) -> Plan:
    """Weights never filled."""

    def change(model: Any) -> None:
        cache = model.self_attn.mla_attn.mla_attn
        for weight in (*model.self_attn.parameters(), cache.W_UK_T, cache.W_UV):
            weight.data.zero_()

    return _after_load(plan, change)


def no_kv_write(plan: Plan) -> Plan:
    """The KV cache is never written: no cache manager."""

    def change(model: Any) -> None:
        model.self_attn.mla_attn.mla_attn.impl.do_kv_cache_update = lambda *_, **__: None

    return _after_load(plan, change)


def no_index_write(plan: Plan) -> Plan:
    """The indexer's key cache is never written."""

    def change(model: Any) -> None:
        model.self_attn.indexer.indexer_op.skip_k_cache_insert = True

    return _after_load(plan, change)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        fp8_kv,
        eager,
        half_heads,
        batch,
        batch_labelled,
        no_indexer,
        extra_elementwise,
        norm_fp32,
        split_fused,
        zero_activations,
        equal_rows,
        zero_weights,
        no_kv_write,
        no_index_write,
    )
}


def _other_batch(case: Case) -> Case:
    """The case with half its batch, or with two requests where there is one."""
    return replace(case, batch=case.batch // 2 if case.batch > 1 else 2)


def _after_load(plan: Plan, change: Callable[[Any], None]) -> Plan:
    """Apply ``change`` to the model as soon as its weights are there."""
    from opkit.layers.backends.vllm.worker import LayerWorker

    honest = LayerWorker.load

    def load(self: LayerWorker, model_class: Any) -> Any:
        model = honest(self, model_class)
        change(model)
        return model

    LayerWorker.load = load  # type: ignore[method-assign]
    return plan


def _inputs_changed(plan: Plan, change: Callable[[Any], Any]) -> Plan:
    """Apply ``change`` to the module's input in every step, also those that fill the caches."""
    from opkit.layers.dsa.vllm import DsaLayer

    honest = DsaLayer.arguments

    def arguments(self: DsaLayer, input_ids: Any, positions: Any) -> dict[str, Any]:
        found = honest(self, input_ids, positions)
        hidden = found["self_attn/hidden_states"]
        hidden.copy_(change(hidden))
        return found

    DsaLayer.arguments = arguments  # type: ignore[method-assign]
    return plan


def main(arguments: list[str]) -> int:
    """``wrong_mocks.py FAULT PLAN.json``."""
    if len(arguments) != 2 or arguments[0] not in FAULTS:
        print(f"usage: wrong_mocks.py FAULT PLAN.json\nfaults: {' '.join(FAULTS)}", file=sys.stderr)
        return EXIT_USAGE
    try:
        plan = read_plan(Path(arguments[1]))
    except OpkitError as error:
        print(f"wrong_mocks: {error}", file=sys.stderr)
        return error.exit_code
    fault = FAULTS[arguments[0]]
    return drive.run(lambda: drive.drive(fault(plan)), drive.traceback_file(plan))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
