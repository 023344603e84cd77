"""Networks in float64, in which two ways to one result differ by rounding alone."""

from __future__ import annotations

from torch import Tensor

from flows.networks.base import Velocity


class InDouble(Velocity):
    """A velocity in float64, for samples of any precision."""

    def __init__(self, inner: Velocity) -> None:
        super().__init__(inner.shape, inner.classes)
        self.inner = inner.double()

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.inner(t.double(), z.double())
