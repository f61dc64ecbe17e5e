"""A plan that the tests of this folder share."""

from __future__ import annotations

import pytest

from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase


@pytest.fixture
def dsa_plan() -> Plan:
    """Two cases of DSA under vLLM, one of each phase."""
    return Plan(
        op="dsa",
        backend="vllm",
        model="model",
        cases=(
            PlannedCase(Case(Phase.CONTEXT, 4, 1024, 0), LaunchMode.EAGER),
            PlannedCase(Case(Phase.GENERATION, 16, 1, 1029), LaunchMode.GRAPH),
        ),
        manifest="mock.opkit.json",
        engine_args=("--max-model-len", "8192", "--compilation-config", '{"mode": 0}'),
        strict=True,
        generation_pause_ms=2.5,
    )
