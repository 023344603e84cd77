"""What a flow's methods return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlowTransport:
    """Samples carried through all blocks.

    Attributes:
        z: (n, *shape), at the other end.
        nfe: evaluations of v per sample, summed over blocks.
        block_nfe: the same for each block, in the flow's order.
        squared_movement: E ‖out − in‖² of each block, in the flow's order.
        squared_norm: E ‖out‖² of each block, where the samples leave it.
    """

    z: Tensor
    nfe: int
    block_nfe: tuple[int, ...]
    squared_movement: tuple[float, ...]
    squared_norm: tuple[float, ...]


@dataclass(frozen=True)
class LogProb:
    """Log-likelihoods and how far to trust them.

    Attributes:
        value: log p(z_0) in nats, (n,).
        standard_error: of each value over the probes, (n,); None if it cannot be known (exact
            divergence: there is none; one probe: no spread).
        inversion_error: ‖z_0 − T⁻¹(T(z_0))‖, (n,).
        nfe: evaluations per sample of the likelihood solve (the inversion check not counted).
        dim: D.
    """

    value: Tensor
    standard_error: Tensor | None
    inversion_error: Tensor
    nfe: int
    dim: int

    @property
    def nll_per_dim(self) -> float:
        """Mean negative log-likelihood, nats per dimension."""
        return -float(self.value.double().mean()) / self.dim
