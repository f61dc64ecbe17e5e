"""The mixture-of-experts mock of plain torch, by the model's own router or by a stated rule."""

from __future__ import annotations

from typing import Any

import torch

from opkit.errors import BadInput
from opkit.layers.backends.torch.experts import MixtureOfExperts
from opkit.layers.backends.torch.mock import TorchMock
from opkit.layers.geometry import Experts
from opkit.layers.moe.routing import assign, steer
from opkit.layers.op import AnyCase, MoeCase
from opkit.layers.plan import Plan, parse_routing


class MoeMock(TorchMock):
    """See :class:`opkit.layers.mock.Mock`."""

    def require(self) -> None:
        """See :meth:`TorchMock.require`."""
        if self.geometry.experts is None:
            raise BadInput(f"{self.origin}: no experts in this model", "its MLP is the op gemm's")

    def check(self, case: AnyCase) -> None:
        """See :meth:`TorchMock.check`."""
        if isinstance(case, MoeCase):
            parse_routing(case.routing)
        else:
            super().check(case)

    def build(self) -> Any:
        """See :meth:`TorchMock.build`."""
        return MixtureOfExperts(self._experts, self.geometry.hidden_size, self.weights)

    def load(self, case: AnyCase) -> None:
        """See :meth:`TorchMock.load`; activations of a driven step are made for its routing."""
        if isinstance(case, MoeCase):
            self.inputs = {"hidden_states": self._steered(case)}
        else:
            super().load(case)

    def launch(self) -> Any:
        """See :meth:`TorchMock.launch`."""
        return self.module(**self.inputs)

    def graph_obstacle(self) -> str:
        """See :meth:`TorchMock.graph_obstacle`."""
        if self.module.experts.grouped:
            return ""
        return (
            "the experts run one after another, their tokens counted on the host, which a CUDA "
            "graph cannot do: torch's grouped product needs bfloat16, a Hopper GPU or later, and "
            "sizes in multiples of 8"
        )

    def model(self) -> dict[str, Any]:
        """See :meth:`TorchMock.model`; ``inter_size`` is the model's, not the rank's."""
        assert self.stored.experts is not None
        return {
            "hidden_size": self.geometry.hidden_size,
            "inter_size": self.stored.experts.intermediate_size,
            "topk": self._experts.topk,
            "num_experts": self._experts.number,
            "includes": "gate",
        }

    def elements(self) -> int:
        """See :meth:`TorchMock.elements`."""
        shape = self._experts
        return shape.number * self.geometry.hidden_size * (3 * shape.intermediate_size + 1)

    def extra_operands(self) -> dict[str, dict[str, int]]:
        """What router and experts are given."""
        return {"router": {"input": 0}, "experts": {"input": 0, "weights": 1}}

    def notes(self) -> tuple[str, ...]:
        """See :meth:`TorchMock.notes`."""
        grouped = "one grouped product for all" if self.module.experts.grouped else "one by one"
        found = [f"experts: {grouped}; the router computes in float32"]
        if self._experts.shared_intermediate_size:
            found.append("the model's shared experts are left out")
        return tuple(found)

    def _recipe(self) -> dict[str, str]:
        driven = {item.case.routing for item in self.plan.cases if isinstance(item.case, MoeCase)}
        recipe = super()._recipe()
        if driven:
            recipe["routing"] = (
                f"{', '.join(sorted(driven))}: normal noise moved by the least that makes the "
                f"router pick the assigned experts, seed {self.plan.seed}"
            )
        return recipe

    @property
    def _experts(self) -> Experts:
        assert self.geometry.experts is not None
        return self.geometry.experts

    def _steered(self, case: MoeCase) -> Any:
        """Hidden states that the router sends where the rule says.

        Raises:
            BadInput: the router cannot be brought to it.
        """
        shape, router = self._experts, self.module.router
        choice = assign(
            case.tokens, shape.number, shape.topk, parse_routing(case.routing), self.plan.seed,
            shape.groups, shape.topk_groups,
        )  # fmt: skip
        hidden = steer(
            router.weight.to(self.dtype), choice, self.plan.seed, torch, scoring=shape.scoring,
            bias=router.bias, groups=shape.groups, topk_groups=shape.topk_groups,
        )  # fmt: skip
        picked = router(hidden)[1].sort(dim=1).values.cpu()
        missed = (picked != torch.as_tensor(choice).sort(dim=1).values).any(dim=1).sum().item()
        if missed:
            raise BadInput(f"{case.label()}: {missed:,} tokens would go to other experts")
        return hidden


def build(plan: Plan, dtype: str | None = None) -> MoeMock:
    """Build the mock that ``plan`` asks for; in another element type than the model's for tests.

    Raises:
        BadInput: the model has no experts, or see :class:`TorchMock`.
    """
    return MoeMock(plan, dtype)
