"""Which start of a batch is joined with which end: the coupling of flow matching."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from flows.errors import FlowError

COUPLINGS = ("independent", "ot")


def optimal_pairing(z: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
    """The order of the targets under which Σ ‖z_i − target_i‖² is least.

    Between two sets of B points with equal weights an optimal plan is a permutation, so the
    assignment problem solves minibatch optimal transport exactly. Straighter pairs cross less:
    the regression has less variance, and the flow needs fewer steps. The cost is O(B³), 60 ms
    for 512 samples of 48 dimensions on one core.

    With labels, starts are joined with the ends of their own class alone: across classes, an end
    would say something about the class, and each class would have noise of its own.

    Args:
        z: starts (B, *shape).
        target: ends (B, *shape).
        labels: (B,), the class of start i and of end i; None for a single class.

    Returns:
        a permutation (B,), int64, on the device of the targets: pair z with ``target[it]``.

    Raises:
        FlowError: shapes differ, or samples are not finite.

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
    a, b = (x.detach().flatten(1).double().cpu().numpy() for x in (z, target))
    try:
        columns = linear_sum_assignment(cdist(a, b, "sqeuclidean"))[1]
    except ValueError as error:
        raise FlowError(f"samples that are not finite cannot be paired ({error})") from error
    return torch.from_numpy(columns).to(target.device)
