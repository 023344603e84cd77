"""Couplings of flow matching: how the starts and the ends of a batch are paired."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from flows.errors import FlowError


def optimal_pairing(z: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
    """Compute the permutation π of the targets that minimises Σ_i ‖z_i − target_π(i)‖².

    An optimal plan between two sets of B equally weighted points is a permutation, so solving the
    assignment problem is exact minibatch optimal transport. The lines between optimal pairs cross
    less: the regression has less variance, and the flow needs fewer steps. The cost is O(B³):
    60 ms for 512 samples of 48 dimensions on one core.

    With labels, starts are paired with the ends of their own class alone. Otherwise an end would
    depend on the class, and the noise of a class would not be N(0, I).

    Args:
        z: starts (B, *shape).
        target: ends (B, *shape).
        labels: int64 (B,), the class of start i and of end i; None for a single class.

    Returns:
        π, int64 (B,), on the device of the targets; ``target[π]`` is paired with z row by row.

    Raises:
        FlowError: the shapes differ, or a sample is not finite.

    Reference: Tong et al., "Improving and generalizing flow-based generative models with
    minibatch optimal transport" (2024); Pooladian et al., "Multisample flow matching" (2023).
    """
    if z.shape != target.shape:
        raise FlowError(f"pairing needs two sets of one shape, found {z.shape}, {target.shape}")
    if labels is not None:
        order = torch.arange(len(z), device=target.device)
        for label in labels.unique():
            rows = (labels == label).nonzero()[:, 0].to(target.device)
            order[rows] = rows[optimal_pairing(z[rows.to(z.device)], target[rows])]
        return order
    a, b = (x.detach().flatten(1).cpu().double().numpy() for x in (z, target))
    try:
        columns = linear_sum_assignment(cdist(a, b, "sqeuclidean"))[1]
    except ValueError as error:
        raise FlowError(f"samples that are not finite cannot be paired ({error})") from error
    return torch.from_numpy(columns).to(target.device)
