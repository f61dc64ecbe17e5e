"""Facts in a line: what a model or a mock does not have is not named."""

from __future__ import annotations

from opkit.reports.facts import model_text, pairs_text


def test_what_is_not_there_is_not_named() -> None:
    absent = {"includes": "", "window_size": 0, "num_shared_experts": None}
    told = {"architecture": "MixtralForCausalLM", "num_experts": 8}
    model = {**told, **absent, "config_sha256": "ab", "rope": {"a": 1}}
    assert model_text({"model": model, "tp_size": 1}) == "MixtralForCausalLM · 8 num_experts · tp 1"
    assert model_text({}) == ""
    dtypes = {"activations": "bfloat16", "weights": "none", "kv_cache": None, "gpu": "H100"}
    assert pairs_text(dtypes) == "activations bfloat16"
    assert pairs_text(None) == ""
