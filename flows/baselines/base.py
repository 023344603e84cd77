"""The interface of all models that a benchmark compares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flows.errors import FlowError
from flows.likelihood import LogProb
from flows.noise import draw_gaussian


@dataclass(frozen=True)
class Decoded:
    """Samples that a model decoded from noise.

    Attributes:
        z: samples z_0 (n, D); a row that failed holds the last iterate, which may be NaN.
        converged: bool (n,), whether the inverse map was found to its tolerance.
        nfe: evaluations of the network per sample.
    """

    z: Tensor
    converged: Tensor
    nfe: int

    @property
    def failures(self) -> int:
        """Return the number of samples whose inverse was not found."""
        return int((~self.converged).sum())


class DensityModel(nn.Module, ABC):
    """A model of the density of vectors z_0 (B, D), with z_K ~ N(0, I) at its noise side.

    Args:
        dim: D.

    Raises:
        FlowError: D is less than 1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise FlowError(f"the dimension of a sample is {dim}; expected at least 1")
        self.dim = dim

    @property
    @abstractmethod
    def blocks(self) -> int:
        """Return the number of blocks."""

    @abstractmethod
    def encode(self, z_0: Tensor) -> Tensor:
        """Map data z_0 (n, D) to noise z_K (n, D), without gradients."""

    @abstractmethod
    def decode_checked(self, z_K: Tensor) -> Decoded:
        """Map noise z_K (n, D) to data, and say for which samples the inverse was found."""

    @abstractmethod
    def log_prob(self, z_0: Tensor, generator: torch.Generator | None = None) -> LogProb:
        """Compute log p(z_0) in nats, (n,), for samples z_0 (n, D), without gradients.

        The generator draws the probes of a model that estimates a trace.
        """

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the training loss of a batch z (B, D): a scalar, with gradients.

        Args:
            z: data (B, D).
            generator: source of probes, times and noise.

        Raises:
            FlowError: the model is trained otherwise, block by block.
        """
        raise FlowError(f"{type(self).__name__} has no loss of one batch; train it by its blocks")

    def refresh(self) -> None:
        """Bring what follows from the weights up to date, after other weights were copied in."""

    def decode(self, z_K: Tensor) -> Tensor:
        """Map noise z_K (n, D) to data z_0 (n, D), without gradients.

        Raises:
            FlowError: the inverse of a sample was not found.
        """
        decoded = self.decode_checked(z_K)
        if decoded.failures:
            raise FlowError(
                f"the inverse of {decoded.failures} of {len(z_K)} samples did not converge; "
                "allow more iterations or a larger tolerance"
            )
        return decoded.z

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n samples z_0 (n, D); see :meth:`decode`.

        Raises:
            FlowError: n < 1, or an inverse was not found.
        """
        return self.decode(self.draw_noise(n, generator))

    def draw_noise(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw z_K ~ N(0, I), (n, D), on the device and in the dtype of the weights.

        Raises:
            FlowError: n < 1.
        """
        if n < 1:
            raise FlowError(f"at least 1 sample must be drawn, not {n}")
        return draw_gaussian((n, self.dim), next(self.parameters()), generator)

    def check_samples(self, z: Tensor) -> None:
        """Raise FlowError unless z is (n, D) with n ≥ 1."""
        if z.dim() != 2 or z.shape[1] != self.dim or len(z) < 1:
            raise FlowError(
                f"the model takes samples (n, {self.dim}) with n ≥ 1, found {tuple(z.shape)}"
            )

    @property
    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())
