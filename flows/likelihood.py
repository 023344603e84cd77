"""Log-likelihoods of a flow, reported with what is needed to trust them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.block import SolverConfig
from flows.flow import Flow
from flows.networks.condition import Condition, check_labels, rows_of
from flows.solving.divergence import Divergence, make_divergence


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


def log_normal(z: Tensor) -> Tensor:
    """The log-density of N(0, I): (B, *shape) → (B,)."""
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
    """Evaluates log p(z_0) = log N(z_K; 0, I) + Σ_k ∫ ∇·v_k dt; given the class, log p(z_0 | y).

    Args:
        flow: the blocks.
        z_0: (n, *shape).
        divergence: estimator of ∇·v, or its name.
        probes: of an estimator given by name.
        solver: None is dopri5 at 1e-5: a likelihood is not read off the training grid, whose
            log-det is that of another, coarser map.
        generator: source of the probes, drawn anew for each block and chunk.
        chunk: samples together in memory; the exact divergence holds D copies of each.
        condition: the classes of the samples, for a flow with classes.

    Returns:
        the values in nats, their standard error over the probes (None if exact, or with a single
        probe), and the inversion error ‖z_0 − T⁻¹(T(z_0))‖ under the same solver.

    Raises:
        FlowError: z_0 has another shape.
        SolveError: with the index of the block that failed.
    """
    if isinstance(divergence, str):
        divergence = make_divergence(divergence, probes=probes)
    flow.check(z_0)
    check_labels(condition, z_0)
    solver = solver or SolverConfig(method="dopri5")
    estimates, errors, evaluations = [], [], 0
    for start in range(0, len(z_0), chunk):
        part, of = z_0[start : start + chunk], rows_of(condition, start, start + chunk)
        z, log_det = part, part.new_zeros(divergence.probes, part.shape[0])
        for index in flow.order(reverse=False):
            eps = divergence.draw_probe(z, generator)
            moved = flow.through(index, z, False, solver, divergence, eps, of)
            assert moved.log_det_probes is not None
            z, log_det = moved.z, log_det + moved.log_det_probes
            evaluations += moved.nfe * part.shape[0]
        estimates.append(log_normal(z) + log_det)
        for index in flow.order(reverse=True):
            z = flow.through(index, z, True, solver, condition=of).z
        errors.append((z - part).flatten(1).norm(dim=1))
    values = torch.cat(estimates, dim=1)
    spread = None
    if divergence.random and divergence.probes > 1:
        spread = values.std(dim=0) / math.sqrt(divergence.probes)
    nfe = round(evaluations / z_0.shape[0])
    return LogProb(values.mean(dim=0), spread, torch.cat(errors), nfe, flow.dim)
