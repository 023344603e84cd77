"""i-ResNet: residual blocks that a spectral constraint makes invertible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flows.baselines.residual import Affine, FixedPoint, InvertibleBlock, ResidualFlow
from flows.errors import FlowError
from flows.likelihood import log_normal
from flows.networks.base import Velocity
from flows.noise import draw_rademacher, initial_weights

#: estimators of the log-determinant in training
ESTIMATORS = ("truncated", "roulette")
#: power iterations on a weight that has had none yet
_START = 60


@dataclass(frozen=True)
class IResNetConfig:
    """The configuration of an i-ResNet.

    Attributes:
        width: hidden features of a residual branch, at least 1.
        depth: hidden layers of a branch; 0 is a linear map.
        blocks: residual blocks, at least 1.
        lipschitz: bound c on the Lipschitz constant of a branch, in (0, 1).
        estimator: ``truncated`` cuts the power series of the log-determinant; ``roulette`` adds
            further terms at random, which makes it unbiased.
        terms: terms of the series that are always computed, at least 1.
        continuation: roulette: probability in (0, 1) that the series goes on after each term.
        power_iterations: power iterations per training step, at least 1.
        fixed_point: settings of the inverse.

    Raises:
        FlowError: a value is out of range.
    """

    width: int = 64
    depth: int = 2
    blocks: int = 8
    lipschitz: float = 0.9
    estimator: str = "truncated"
    terms: int = 8
    continuation: float = 0.5
    power_iterations: int = 5
    fixed_point: FixedPoint = field(default_factory=FixedPoint)

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name, least in (("width", 1), ("depth", 0), ("blocks", 1), ("terms", 1),
                            ("power_iterations", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise FlowError(
                    f"iresnet.{name} is {getattr(self, name)}; expected at least {least}"
                )
        for name in ("lipschitz", "continuation"):
            if not 0 < getattr(self, name) < 1:
                raise FlowError(
                    f"iresnet.{name} is {getattr(self, name)}; expected a number in (0, 1)"
                )
        if self.estimator not in ESTIMATORS:
            raise FlowError(
                f"iresnet.estimator is {self.estimator!r}; expected one of {', '.join(ESTIMATORS)}"
            )


class SpectralLinear(nn.Linear):
    """A linear layer whose weight is scaled down so that its spectral norm is at most ``bound``.

    Power iterations estimate the norm σ from below: W ← W · min(1, bound / σ). The layer starts
    with many of them, and each training step adds some.

    Args:
        inputs: input features.
        outputs: output features.
        bound: the bound, positive.

    Reference: Miyato et al. (2018); Behrmann et al., "Invertible residual networks" (2019), §2.1.
    """

    def __init__(self, inputs: int, outputs: int, bound: float) -> None:
        super().__init__(inputs, outputs)
        self.bound = bound
        self.left: Tensor
        self.right: Tensor
        self.register_buffer("left", F.normalize(torch.ones(outputs), dim=0))
        self.register_buffer("right", F.normalize(torch.ones(inputs), dim=0))
        if not self.weight.is_meta:
            self.iterate(_START)

    @torch.no_grad()
    def iterate(self, count: int) -> None:
        """Improve the singular vectors by power iterations."""
        for _ in range(count):
            self.left.copy_(F.normalize(self.weight @ self.right, dim=0))
            self.right.copy_(F.normalize(self.weight.T @ self.left, dim=0))

    def scaled(self) -> Tensor:
        """Return the weight of the bounded map (outputs, inputs)."""
        norm = self.left @ self.weight @ self.right
        factor = (self.bound / norm.clamp(min=1e-12)).clamp(max=1.0)
        return factor * self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer at x (B, inputs)."""
        return F.linear(x, self.scaled(), self.bias)


class LipschitzMlp(Velocity):
    """A multilayer perceptron with ELU whose Lipschitz constant is at most ``lipschitz``.

    Each of its layers has the bound c^{1/layers}, and ELU has slopes in (0, 1].

    Args:
        config: width, depth and bound.
        dim: D.
    """

    def __init__(self, config: IResNetConfig, dim: int) -> None:
        super().__init__((dim,))
        sizes = [dim, *[config.width] * config.depth, dim]
        bound = config.lipschitz ** (1 / (len(sizes) - 1))
        self.layers = nn.ModuleList(
            SpectralLinear(inputs, outputs, bound)
            for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True)
        )

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Evaluate the network at z (B, D); it does not depend on t."""
        first, *others = self.layers
        hidden = first(z)
        for layer in others:
            hidden = layer(F.elu(hidden))
        return hidden

    def linearise(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Compute the network at z (B, D), and its derivative there.

        The derivative maps tangents (…, B, D) to J tangents of the same shape, by the chain rule.
        """
        weights, biases, slopes = [], [], []
        for layer in self.layers:
            assert isinstance(layer, SpectralLinear)
            weights.append(layer.scaled())
            biases.append(layer.bias)
        hidden = F.linear(z, weights[0], biases[0])
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            slopes.append(hidden.clamp(max=0).exp())  # of ELU
            hidden = F.linear(F.elu(hidden), weight, bias)

        def push(tangents: Tensor) -> Tensor:
            moved = F.linear(tangents, weights[0])
            for slope, weight in zip(slopes, weights[1:], strict=True):
                moved = F.linear(slope * moved, weight)
            return moved

        return hidden, push

    def directional(
        self, t: Tensor, z: Tensor, tangents: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the derivatives (n, B, D) by the chain rule; see :class:`Velocity`."""
        value, push = self.linearise(z)
        return value, push(tangents)


class IResNet(ResidualFlow):
    """Residual blocks with contractive branches, trained by maximum likelihood.

        log det(I + J) = Σ_{k≥1} (−1)^{k+1} tr(Jᵏ) / k,  ‖J‖ ≤ c < 1

    Training estimates the traces with one Rademacher probe. Likelihoods use the full Jacobian.

    Args:
        config: the configuration.
        dim: D.
        generator: source of the initial weights.

    Reference: Behrmann et al., "Invertible residual networks" (ICML 2019); Chen et al., "Residual
    flows for invertible generative modeling" (NeurIPS 2019) for the roulette.
    """

    def __init__(
        self, config: IResNetConfig, dim: int, generator: torch.Generator | None = None
    ) -> None:
        with initial_weights(generator):
            layers = [
                InvertibleBlock(LipschitzMlp(config, dim), Affine(dim))
                for _ in range(config.blocks)
            ]
        super().__init__(dim, layers, config.fixed_point)
        self.config = config

    def refresh(self, iterations: int = _START) -> None:
        """Estimate the spectral norms of the present weights by power iterations."""
        for module in self.modules():
            if isinstance(module, SpectralLinear):
                module.iterate(iterations)

    def loss(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Compute the negative log-likelihood of a batch z (B, D), a scalar in nats.

        The first batch initialises the affine maps.
        """
        self.refresh(self.config.power_iterations)
        log_det = z.new_zeros(len(z))
        for layer in self.layers:
            assert isinstance(layer, InvertibleBlock) and layer.affine is not None
            layer.affine.initialise(z)
            weights = self.series_weights(generator)
            eps = draw_rademacher(tuple(z.shape), z, generator)
            u = layer.prepare(z)
            z, change = series_log_det(layer, u, eps, weights)
            log_det = log_det + change + layer.affine_log_det()
        return (-log_normal(z) - log_det).mean()

    def series_weights(self, generator: torch.Generator | None = None) -> list[float]:
        """Return the weights of the terms of the power series in one estimate.

        A truncated series has weights 1. The roulette goes on after each further term with
        probability q, and weighs the n-th of them by q⁻ⁿ.
        """
        weights = [1.0] * self.config.terms
        if self.config.estimator == "roulette":
            q = self.config.continuation
            while float(torch.rand((), generator=generator)) < q:
                weights.append(q ** -(len(weights) - self.config.terms + 1))
        return weights


def series_log_det(
    layer: InvertibleBlock, u: Tensor, eps: Tensor, weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Compute u + g(u) and an estimate of log det(I + ∂g/∂u) by its power series.

        Σ_k w_k (−1)^{k+1} εᵀ Jᵏ ε / k

    Args:
        layer: the block.
        u: samples (B, D), after the affine map.
        eps: probe (B, D).
        weights: w_1, w_2, …

    Returns:
        u + g(u), (B, D), and the estimate (B,), both with gradients.
    """
    assert isinstance(layer.branch, LipschitzMlp)
    g, push = layer.branch.linearise(u)
    vector, total = eps, u.new_zeros(len(u))
    for order, weight in enumerate(weights, start=1):
        vector = push(vector)
        total = total + (-1) ** (order + 1) * weight / order * (vector * eps).sum(dim=1)
    return u + g, total
