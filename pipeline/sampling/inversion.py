"""Inversion of a flow: latents z_0 to noise z_K and back, with the error of the round trip.

The *inversion error* is the mean over dimensions of (z_0 − S(z_K))², where S is the map of the
sampler. The solver's steps from data to noise, F, are the inverse of S up to their error only. A
solver with fixed steps gets one fixed-point step towards the exact inverse:

    z_K = F(z_0 + (z_0 − S(F(z_0))))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.flow import Flow
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig


@dataclass(frozen=True)
class Inversion:
    """Noise of n images.

    Attributes:
        latents: z_0, standardised, (n, *shape).
        noise: z_K, (n, *shape).
        returned: S(z_K), (n, *shape).
    """

    latents: Tensor
    noise: Tensor
    returned: Tensor

    @property
    def error(self) -> Tensor:
        """Inversion error of each image, the mean square over dimensions, (n,)."""
        return (self.latents - self.returned).flatten(1).cpu().double().square().mean(1).float()


def round_trip(
    flow: Flow, solvers: Sequence[SolverConfig], z_0: Tensor, condition: Condition | None
) -> tuple[Tensor, Tensor]:
    """Carry latents (n, *shape) to noise and back; each sample keeps its smaller error."""

    def carry(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise = flow.encode(z, solvers, condition=condition)
        returned = flow.decode(noise, solvers, condition=condition)
        return noise, returned, (z_0 - returned).flatten(1).square().mean(1)

    noise, returned, error = carry(z_0)
    if all(solver.adaptive for solver in solvers):
        return noise, returned
    closer_noise, closer, smaller = carry(2 * z_0 - returned)
    better = (smaller < error).view(-1, *[1] * (z_0.ndim - 1))
    return torch.where(better, closer_noise, noise), torch.where(better, closer, returned)
