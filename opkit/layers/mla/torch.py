"""The MLA mock of plain torch: latent attention over all cached tokens.

Source: DeepSeek-V2 (2024), section 2.1; DeepSeek-V3 (2024).
"""

from __future__ import annotations

from opkit.layers.backends.torch.attention import LatentMock
from opkit.layers.plan import Plan


class MlaMock(LatentMock):
    """See :class:`opkit.layers.mock.Mock`; of a model with an indexer, the attention without it."""

    sparse = False


def build(plan: Plan, dtype: str | None = None) -> MlaMock:
    """Build the mock that ``plan`` asks for; in another element type than the model's for tests.

    Raises:
        BadInput: the model has no latent attention, or see :class:`TorchMock`.
    """
    return MlaMock(plan, dtype)
