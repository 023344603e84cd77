"""Autoregressive flows, masked affine (MAF) and neural splines (NSF), of the library zuko."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flows.baselines.base import Decoded, DensityModel
from flows.errors import FlowError
from flows.likelihood import LogProb, log_normal
from flows.noise import initial_weights


@dataclass(frozen=True)
class AutoregressiveConfig:
    """The configuration of an autoregressive flow.

    Attributes:
        width: hidden features of a masked network, at least 1.
        depth: hidden layers of a masked network, at least 1.
        blocks: autoregressive maps, at least 1; every second one has the reverse order.
        bins: bins of a rational-quadratic spline on [−5, 5], at least 2; 0 is an affine map.

    Raises:
        FlowError: a value is out of range.
    """

    width: int = 64
    depth: int = 2
    blocks: int = 5
    bins: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("width", "depth", "blocks"):
            if getattr(self, name) < 1:
                raise FlowError(
                    f"autoregressive.{name} is {getattr(self, name)}; expected at least 1"
                )
        if self.bins < 0 or self.bins == 1:
            raise FlowError(f"autoregressive.bins is {self.bins}; expected 0, or at least 2")


class Autoregressive(DensityModel):
    """Autoregressive maps that are trained together, by maximum likelihood.

    The map from data to noise needs one evaluation of each network, and its inverse D of them.

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Raises:
        FlowError: zuko is not installed.

    Reference: Papamakarios, Pavlakou, Murray (NeurIPS 2017) for MAF; Durkan, Bekasov, Murray,
    Papamakarios (NeurIPS 2019) for NSF; the library zuko.
    """

    def __init__(
        self, config: AutoregressiveConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim)
        self.config = config
        zuko = _zuko()
        shape = {
            "transforms": config.blocks,
            "hidden_features": [config.width] * config.depth,
        }
        with initial_weights(generator):
            if config.bins:
                self.maps = zuko.flows.NSF(dim, bins=config.bins, **shape)
            else:
                self.maps = zuko.flows.MAF(dim, **shape)

    @property
    def blocks(self) -> int:
        """Return the number of maps."""
        return self.config.blocks

    def forward_map(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        """Compute z_K (n, D) and the log-determinant in nats, (n,), with gradients."""
        self.check_samples(z_0)
        z_K, log_det = self.maps().transform.call_and_ladj(z_0)
        return z_K, log_det

    @torch.no_grad()
    def encode(self, z_0: Tensor) -> Tensor:
        """Map data z_0 (n, D) to noise z_K (n, D)."""
        return self.forward_map(z_0)[0]

    @torch.no_grad()
    def decode_checked(self, z_K: Tensor) -> Decoded:
        """Map noise z_K (n, D) to data by the inverse in closed form, one coordinate at a time."""
        self.check_samples(z_K)
        z_0 = self.maps().transform.inv(z_K)
        converged = z_0.isfinite().all(dim=1).cpu()
        return Decoded(z_0, converged, self.dim * self.blocks)

    @torch.no_grad()
    def log_prob(self, z_0: Tensor, generator: torch.Generator | None = None) -> LogProb:
        """Compute log p(z_0) in nats, (n,), for samples z_0 (n, D), in closed form."""
        z_K, log_det = self.forward_map(z_0)
        error = (self.decode_checked(z_K).z - z_0).norm(dim=1)
        return LogProb(log_normal(z_K) + log_det, None, error, self.blocks, self.dim)

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the negative log-likelihood of a batch z (B, D), a scalar in nats."""
        z_K, log_det = self.forward_map(z)
        return (-log_normal(z_K) - log_det).mean()


def _zuko() -> Any:  # noqa: ANN401 - a module
    """Import zuko.

    Raises:
        FlowError: it is not installed.
    """
    try:
        import zuko
    except ImportError as error:
        raise FlowError(
            "the models maf and nsf need the package zuko, which is not installed; run: "
            "pip install 'jkoflow[zuko]'"
        ) from error
    return zuko
