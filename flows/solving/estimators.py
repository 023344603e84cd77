"""Estimators of the divergence: exact, Hutchinson's, and the paper's finite differences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Velocity
from flows.noise import draw_gaussian, draw_rademacher
from flows.solving.divergence import Divergence


@dataclass(frozen=True)
class Exact(Divergence):
    """The exact divergence Σ_i e_iᵀ (∂v/∂z) e_i, by forward-mode differentiation.

    Attributes:
        chunk: basis vectors e_i in one evaluation; None takes all D, which needs D times the
            memory of v.

    Raises:
        FlowError: the chunk is less than 1.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        """Check the chunk."""
        if self.chunk is not None and self.chunk < 1:
            raise FlowError(f"the exact divergence's chunk must be at least 1, not {self.chunk}")

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute v (B, *shape) and the trace (1, B), without probes; see :class:`Divergence`."""
        dim = z[0].numel()
        basis = torch.eye(dim, dtype=z.dtype, device=z.device)
        v: Tensor | None = None
        trace = z.new_zeros(z.shape[0])
        for start in range(0, dim, self.chunk or dim):
            rows = basis[start : start + (self.chunk or dim)]
            tangents = rows.view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
            v, derivatives = velocity.directional(t, z, tangents)
            trace = trace + (derivatives.flatten(2) * rows[:, None]).sum(dim=(0, 2))
        assert v is not None
        return v, trace[None]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """The unbiased estimator εᵀ (∂v/∂z) ε with E[ε εᵀ] = I.

    Attributes:
        probes: independent probes n ≥ 1; the variance of their mean falls as 1/n.
        noise: distribution of ε: ``rademacher`` (±1), whose variance is smaller, and zero for a
            diagonal Jacobian, or ``gaussian``.
        mode: ``vjp`` (reverse-mode differentiation) or ``jvp`` (forward mode).

    Raises:
        FlowError: a name is unknown, or there is no probe.

    Reference: Hutchinson (1990); used for neural ODEs by Grathwohl et al. (2019).
    """

    probes: int = 1
    noise: str = "rademacher"
    mode: str = "vjp"
    random = True

    def __post_init__(self) -> None:
        """Check the names and the number of probes."""
        _check_probes(self.probes)
        _check_noise(self.noise)
        if self.mode not in ("vjp", "jvp"):
            raise FlowError(f"unknown mode {self.mode!r}; choose vjp or jvp")

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw probes (n, B, *shape) for samples z (B, *shape); see :class:`Divergence`."""
        return _draw(self.noise, (self.probes, *z.shape), z, generator)

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute v (B, *shape) and εᵀ (∂v/∂z) ε, (n, B); see :class:`Divergence`."""
        eps = self._require(z, eps)
        if self.mode == "vjp":
            return self._reverse_mode(velocity, t, z, eps)
        v, derivatives = velocity.directional(t, z, eps)
        return v, (derivatives * eps).flatten(2).sum(dim=2)

    def _reverse_mode(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            x = z if training and z.requires_grad else z.detach().requires_grad_()
            v = velocity(t, x)
            estimates = []
            for index, probe in enumerate(eps):
                keep = training or index + 1 < self.probes
                (product,) = torch.autograd.grad(
                    v, x, probe, create_graph=training, retain_graph=keep
                )
                estimates.append((product * probe).flatten(1).sum(dim=1))
        div = torch.stack(estimates)
        return (v, div) if training else (v.detach(), div.detach())


@dataclass(frozen=True)
class FiniteDifference(Divergence):
    """The paper's estimator ε·(v(z + σε) − v(z)) / σ with σ = σ₀/√D.

    Training with it needs no second derivatives. Its bias is O(σ²), because ε is symmetric. With
    Gaussian noise its mean is the divergence of v smoothed by N(0, σ² I) (Stein's identity). Both
    points go through the network as one batch.

    A penalty λ subtracts λ‖(v(z + σε) − v(z)) / σ‖², whose mean is λ‖∂v/∂z‖²_F up to O(σ²). It
    keeps an objective that maximises ∫∇·v from fields that the training grid cannot follow.
    Likelihoods must be computed without it.

    Attributes:
        sigma0: σ₀, positive.
        probes: independent probes n ≥ 1.
        noise: ``gaussian`` (the paper's) or ``rademacher`` (±1), whose variance is smaller.
        penalty: λ, not negative.

    Raises:
        FlowError: a value is out of range.

    Reference: JKO-iFlow, finite-difference estimate of the divergence; Finlay et al. (2020) for
    the Frobenius norm of the Jacobian as a regulariser of neural ODEs.
    """

    sigma0: float = 0.02
    probes: int = 1
    noise: str = "gaussian"
    penalty: float = 0.0
    random = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_probes(self.probes)
        _check_noise(self.noise)
        if not 0 < self.sigma0 < float("inf"):
            raise FlowError(f"sigma0 must be positive, found {self.sigma0}")
        if not 0 <= self.penalty < float("inf"):
            raise FlowError(f"the Jacobian's penalty must not be negative, found {self.penalty}")

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw probes (n, B, *shape) for samples z (B, *shape); see :class:`Divergence`."""
        return _draw(self.noise, (self.probes, *z.shape), z, generator)

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute v (B, *shape) and the difference quotients (n, B); see :class:`Divergence`."""
        eps = self._require(z, eps)
        sigma = self.sigma0 / z[0].numel() ** 0.5
        shifted = torch.add(z, eps, alpha=sigma)  # (n, B, *shape)
        both = velocity(t, torch.cat([z, shifted.flatten(0, 1)]))
        v, v_shifted = both[: z.shape[0]], both[z.shape[0] :].view_as(eps)
        change = v_shifted - v
        div = (change * eps).flatten(2).sum(dim=2) / sigma
        if self.penalty:
            div = div - self.penalty * change.square().flatten(2).sum(dim=2) / sigma**2
        return v, div


def make_divergence(
    name: str,
    *,
    probes: int = 1,
    noise: str | None = None,
    mode: str = "vjp",
    sigma0: float = 0.02,
    penalty: float = 0.0,
    chunk: int | None = None,
) -> Divergence:
    """Build the estimator named ``exact``, ``hutchinson`` or ``finite-difference``.

    The other arguments are attributes of the estimators (:class:`Exact`, :class:`Hutchinson`,
    :class:`FiniteDifference`). Those that the named one lacks are ignored, but ``probes`` is
    always checked.

    Raises:
        FlowError: the name is unknown, or a value is out of range.
    """
    _check_probes(probes)
    if name == "exact":
        return Exact(chunk=chunk)
    if name == "hutchinson":
        return Hutchinson(probes=probes, noise=noise or "rademacher", mode=mode)
    if name == "finite-difference":
        noise = noise or "gaussian"
        return FiniteDifference(sigma0=sigma0, probes=probes, noise=noise, penalty=penalty)
    raise FlowError(f"unknown divergence {name!r}; choose exact, hutchinson or finite-difference")


def _check_noise(noise: str) -> None:
    if noise not in ("rademacher", "gaussian"):
        raise FlowError(f"unknown noise {noise!r}; choose rademacher or gaussian")


def _draw(
    noise: str, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    draw = draw_gaussian if noise == "gaussian" else draw_rademacher
    return draw(shape, like, generator)


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise FlowError(f"a divergence needs at least 1 probe, not {probes}")
