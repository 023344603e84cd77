"""The interface of estimators of the divergence ∇·v = tr ∂v/∂z.

An estimator computes the velocity along with the divergence and returns both. A random estimator
takes its probes ε as an argument, from :meth:`Divergence.draw_probe`. An adaptive solver needs
probes that are held through the whole solve, because its right-hand side must be deterministic. On
a fixed grid each evaluation may have its own (:data:`Probes`). The estimate is then unbiased, too,
and has a smaller variance.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Velocity

#: the probes (n, B, *shape) of each evaluation of a solve, by its number from 0
Probes = Callable[[int], Tensor]


class Divergence(ABC):
    """An estimator of ∇·v.

    Attributes:
        probes: number n of estimates that :meth:`estimates` returns.
        costs: number m of running costs that :meth:`estimates` returns after them.
        random: whether the estimates depend on probes.
    """

    probes: int = 1
    costs: int = 0
    random: bool = False

    @abstractmethod
    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the velocity, and an estimate of its divergence by each probe.

        Args:
            velocity: the field.
            t: 0-d time.
            z: samples (B, *shape).
            eps: probes (n, B, *shape); None for the exact divergence.

        Returns:
            v(t, z), (B, *shape), and the estimates and costs (n + m, B) per unit t. Both are
            differentiable in z and the parameters if gradients are enabled.

        Raises:
            FlowError: the probes are missing or have another shape.
        """

    def __call__(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the velocity (B, *shape) and the divergence (B,), its mean over the probes."""
        v, div = self.estimates(velocity, t, z, eps)
        return v, div[0] if self.probes == 1 else div[: self.probes].mean(dim=0)

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw probes ε (n, B, *shape) of a solve or an evaluation; None for the exact divergence.

        Args:
            z: samples (B, *shape), whose device and dtype the probes get.
            generator: source of the probes, which may be on another device.
        """
        return None

    def _require(self, z: Tensor, eps: Tensor | None) -> Tensor:
        expected = (self.probes, *z.shape)
        if eps is None or tuple(eps.shape) != expected:
            shape = "none" if eps is None else tuple(eps.shape)
            raise FlowError(
                f"a random divergence needs its probe of shape {expected}, found {shape}; "
                "draw it with draw_probe(z, generator)"
            )
        return eps
