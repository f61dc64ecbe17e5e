"""The DSA mock of plain torch: latent attention with a lightning indexer, faithful to DeepSeek's.

Source: DeepSeek-V3.2-Exp, technical report and ``inference/model.py`` (2025). What is left out is
said in the manifest's notes.
"""

from __future__ import annotations

from opkit.layers.backends.torch.attention import LatentMock
from opkit.layers.plan import Plan


class DsaMock(LatentMock):
    """See :class:`opkit.layers.mock.Mock`."""

    sparse = True


def build(plan: Plan, dtype: str | None = None) -> DsaMock:
    """Build the mock that ``plan`` asks for; in another element type than the model's for tests.

    Raises:
        BadInput: the model has no indexer, or see :class:`TorchMock`.
    """
    return DsaMock(plan, dtype)
