"""Estimators of the divergence ∇·v = tr ∂v/∂z, one interface for the exact and the random ones.

Every estimator returns the velocity and the divergence together, because all of them get the
first for nothing while they compute the second. A random estimator takes its probe ε as an
argument: the probe is drawn once (:meth:`Divergence.draw_probe`) and held through a whole solve,
so that the solver sees a deterministic right-hand side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.errors import FlowError
from flows.networks.base import Velocity


class Divergence(ABC):
    """An estimator of ∇·v that can be used inside training and for likelihoods."""

    #: number of independent estimates that :meth:`estimates` returns
    probes: int = 1
    #: whether the estimate depends on a probe
    random: bool = False

    @abstractmethod
    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity and one divergence estimate a probe.

        Args:
            velocity: the field; samples must not interact.
            t: 0-d time.
            z: samples (B, *shape).
            eps: probes (n, B, *shape); None for the exact divergence.

        Returns:
            v (B, *shape) and the estimates (n, B), differentiable in z and the parameters whenever
            gradients are enabled.
        """

    def __call__(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The velocity (B, *shape) and the divergence (B,), the mean over the probes."""
        v, div = self.estimates(velocity, t, z, eps)
        return v, div[0] if div.shape[0] == 1 else div.mean(dim=0)

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Draws ε for one solve: (n, B, *shape), or None for the exact divergence.

        The numbers come from the generator's own device, then move to z's.
        """
        return None

    def _require(self, z: Tensor, eps: Tensor | None) -> Tensor:
        expected = (self.probes, *z.shape)
        if eps is None or tuple(eps.shape) != expected:
            found = "none" if eps is None else tuple(eps.shape)
            raise FlowError(
                f"a random divergence needs its probe of shape {expected}, found {found}; "
                "draw it once a solve with draw_probe(z, generator)"
            )
        return eps


@dataclass(frozen=True)
class Exact(Divergence):
    """The trace of the Jacobian: Σ_i e_iᵀ (∂v/∂z) e_i, by forward mode over all i at once.

    Attributes:
        chunk: basis vectors taken together; None takes all D, which costs D times the memory of
            one evaluation.
    """

    chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuses an empty chunk."""
        if self.chunk is not None and self.chunk < 1:
            raise FlowError(f"the exact divergence's chunk must be at least 1, not {self.chunk}")

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Divergence`; ε is not used."""
        dim = z[0].numel()
        basis = torch.eye(dim, dtype=z.dtype, device=z.device)
        v: Tensor | None = None
        trace = z.new_zeros(z.shape[0])
        for start in range(0, dim, self.chunk or dim):
            rows = basis[start : start + (self.chunk or dim)]
            tangents = rows.view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
            v, moved = velocity.directional(t, z, tangents)
            trace = trace + (moved.flatten(2) * rows[:, None]).sum(dim=(0, 2))
        assert v is not None
        return v, trace[None]


@dataclass(frozen=True)
class Hutchinson(Divergence):
    """εᵀ (∂v/∂z) ε with E[ε εᵀ] = I: unbiased, from one derivative product a probe.

    Attributes:
        probes: independent probes n ≥ 1; the variance falls as 1/n.
        noise: ``rademacher`` (±1: the smaller variance, zero for a diagonal Jacobian) or
            ``gaussian``.
        mode: ``vjp`` (reverse mode) or ``jvp`` (forward mode).

    Reference: Hutchinson (1990); used for neural ODEs by Grathwohl et al. (2019).
    """

    probes: int = 1
    noise: str = "rademacher"
    mode: str = "vjp"
    random = True

    def __post_init__(self) -> None:
        """Refuses unknown names and fewer than one probe."""
        _check_probes(self.probes)
        if self.noise not in ("rademacher", "gaussian"):
            raise FlowError(f"unknown noise {self.noise!r}; choose rademacher or gaussian")
        if self.mode not in ("vjp", "jvp"):
            raise FlowError(f"unknown mode {self.mode!r}; choose vjp or jvp")

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Divergence`."""
        return _draw((self.probes, *z.shape), self.noise, z, generator)

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Divergence`."""
        eps = self._require(z, eps)
        if self.mode == "vjp":
            return self._reverse_mode(velocity, t, z, eps)
        v, moved = velocity.directional(t, z, eps)
        return v, (moved * eps).flatten(2).sum(dim=2)

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
                (pulled,) = torch.autograd.grad(
                    v, x, probe, create_graph=training, retain_graph=keep
                )
                estimates.append(_dot(pulled, probe))
        div = torch.stack(estimates)
        return (v, div) if training else (v.detach(), div.detach())


@dataclass(frozen=True)
class FiniteDifference(Divergence):
    """ε·(v(z + σε) − v(z)) / σ with ε ~ N(0, I), σ = σ₀/√D: the paper's estimator.

    It needs no second derivative in training. Both evaluations go through the network as one
    batch, so that v costs nothing extra. The bias is O(σ).

    With a penalty λ the estimate is lowered by λ‖(v(z + σε) − v(z)) / σ‖², which is λ‖∂v/∂z‖²_F in
    the mean and costs nothing: an objective that wants ∫∇·v large then wants a field that its
    training grid can follow. For training only; no likelihood is measured with it.

    Attributes:
        sigma0: length of the finite step before division by √D; positive.
        probes: independent probes n ≥ 1.
        penalty: λ, not negative.

    Reference: JKO-iFlow, finite-difference estimate of the divergence; Finlay et al. (2020) for
    the Frobenius norm of the Jacobian as a regulariser of neural ODEs.
    """

    sigma0: float = 0.02
    probes: int = 1
    penalty: float = 0.0
    random = True

    def __post_init__(self) -> None:
        """Refuses a step that is not positive and fewer than one probe."""
        _check_probes(self.probes)
        if not 0 < self.sigma0 < float("inf"):
            raise FlowError(f"sigma0 must be positive, found {self.sigma0}")
        if not 0 <= self.penalty < float("inf"):
            raise FlowError(f"the Jacobian's penalty must not be negative, found {self.penalty}")

    def draw_probe(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Divergence`."""
        return _draw((self.probes, *z.shape), "gaussian", z, generator)

    def estimates(
        self, velocity: Velocity, t: Tensor, z: Tensor, eps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Divergence`."""
        eps = self._require(z, eps)
        sigma = self.sigma0 / z[0].numel() ** 0.5
        moved = torch.add(z, eps, alpha=sigma)  # (n, B, *shape)
        both = velocity(t, torch.cat([z, moved.flatten(0, 1)]))
        v, v_moved = both[: z.shape[0]], both[z.shape[0] :].view_as(eps)
        change = v_moved - v
        div = (change * eps).flatten(2).sum(dim=2) / sigma
        if self.penalty:
            div = div - self.penalty * change.square().flatten(2).sum(dim=2) / sigma**2
        return v, div


def make_divergence(
    name: str,
    *,
    probes: int = 1,
    noise: str = "rademacher",
    mode: str = "vjp",
    sigma0: float = 0.02,
    penalty: float = 0.0,
    chunk: int | None = None,
) -> Divergence:
    """The estimator called ``exact``, ``hutchinson`` or ``finite-difference``.

    Arguments that the named estimator does not have are ignored, except that ``probes`` is always
    checked.

    Raises:
        FlowError: unknown name, or a value out of range.
    """
    _check_probes(probes)
    if name == "exact":
        return Exact(chunk=chunk)
    if name == "hutchinson":
        return Hutchinson(probes=probes, noise=noise, mode=mode)
    if name == "finite-difference":
        return FiniteDifference(sigma0=sigma0, probes=probes, penalty=penalty)
    raise FlowError(f"unknown divergence {name!r}; choose exact, hutchinson or finite-difference")


def _check_probes(probes: int) -> None:
    if probes < 1:
        raise FlowError(f"a divergence needs at least 1 probe, not {probes}")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample: (B, *shape) × (B, *shape) → (B,)."""
    return (a * b).flatten(1).sum(dim=1)


def _draw(
    shape: tuple[int, ...], noise: str, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    device = like.device if generator is None else generator.device
    if noise == "gaussian":
        probe = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    else:
        coin = torch.randint(2, shape, generator=generator, device=device)
        probe = coin.to(like.dtype).mul_(2).sub_(1)
    return probe.to(like.device)
