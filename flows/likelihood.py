"""Log-likelihoods of a flow, with the errors that tell how far to trust them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.flow import Flow
from flows.networks.condition import Condition, in_chunks
from flows.solving.divergence import Divergence
from flows.solving.estimators import make_divergence
from flows.solving.solver import SolverConfig


@dataclass(frozen=True)
class LogProb:
    """Log-likelihoods of n samples and their errors.

    Attributes:
        value: log p(z_0) in nats, (n,).
        standard_error: standard error of each value over the probes in nats, (n,); None for the
            exact divergence, and for a single probe.
        inversion_error: ‖z_0 − T⁻¹(T(z_0))‖, (n,), with the same solver.
        nfe: evaluations of v per sample in the likelihood solve, without the inversion.
        dim: D.
    """

    value: Tensor
    standard_error: Tensor | None
    inversion_error: Tensor
    nfe: int
    dim: int

    @property
    def nll_per_dim(self) -> float:
        """Return the mean negative log-likelihood in nats per dimension."""
        return -float(self.value.cpu().double().mean()) / self.dim


def log_normal(z: Tensor) -> Tensor:
    """Compute log N(z; 0, I) in nats, (B,), for samples z (B, *shape)."""
    flat = z.flatten(1)
    return -(flat.square().sum(dim=1) + flat.shape[1] * math.log(2 * math.pi)) / 2


@torch.no_grad()
def log_prob(
    flow: Flow,
    z_0: Tensor,
    divergence: str | Divergence = "exact",
    probes: int = 1,
    solver: SolverConfig | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 1024,
    condition: Condition | None = None,
) -> LogProb:
    """Compute log p(z_0) = log N(z_K; 0, I) + Σ_k ∫₀¹ ∇·v_k dt of samples (n, *shape), n ≥ 1.

    Given labels it is log p(z_0 | y). The divergence is an estimator of ∇·v, or its name with a
    number of probes, which the generator draws for each block and chunk. The default solver is
    dopri5 with tolerance 1e-5: the training grid is too coarse for the log-det of the flow's map.
    ``chunk`` samples are in memory together; the exact divergence needs D times their memory.

    Raises:
        FlowError: z_0 has another shape, or the condition does not fit.
        SolveError: a block cannot be solved; the error names it.
    """
    if isinstance(divergence, str):
        divergence = make_divergence(divergence, probes=probes)
    flow.check_samples(z_0)
    solver = solver or SolverConfig(method="dopri5")
    estimates, errors, evaluations = [], [], 0
    for part, given in in_chunks(z_0, condition, chunk):
        z, log_det = part, part.new_zeros(divergence.probes, part.shape[0])
        for index in flow.block_order(reverse=False):
            eps = divergence.draw_probe(z, generator)
            moved = flow.transport_block(index, z, False, solver, divergence, eps, given)
            assert moved.log_det_probes is not None
            z, log_det = moved.z, log_det + moved.log_det_probes
            evaluations += moved.nfe * part.shape[0]
        estimates.append(log_normal(z) + log_det)
        for index in flow.block_order(reverse=True):
            z = flow.transport_block(index, z, True, solver, condition=given).z
        errors.append((z - part).flatten(1).norm(dim=1))
    values = torch.cat(estimates, dim=1)
    standard_error = None
    if divergence.random and divergence.probes > 1:
        standard_error = values.std(dim=0) / math.sqrt(divergence.probes)
    nfe = round(evaluations / z_0.shape[0])
    return LogProb(values.mean(dim=0), standard_error, torch.cat(errors), nfe, flow.dim)
