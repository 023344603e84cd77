"""Gradients of a batch that several ranks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline.runtime.distributed import sum_over_ranks


def average_gradients(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], weight: float, loss: Tensor
) -> Tensor:
    """Replace the gradients on every rank by those of the mean loss of the whole batch.

        g ← (1/R) Σ_r w_r g_r,   w_r = R · (samples on rank r) / (samples of the batch)

    All ranks call it with the same parameters; one without a gradient counts as zero. A single
    rank changes nothing. The loss (1,) is the mean over the samples of this rank; that of the
    whole batch is returned, (1,). A NaN on one rank makes it NaN on all.
    """
    if accelerator.num_processes == 1:
        return loss
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss])
    flat = accelerator.reduce(weight * flat, "mean")
    *parts, loss = flat.split([*(gradient.numel() for gradient in gradients), 1])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return loss


def fill_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Set gradients to zero that this rank lacks and another has.

    All ranks call it with the same parameters. A parameter without a gradient on every rank stays
    without one, so that an optimiser passes over it.
    """
    if accelerator.num_processes == 1:
        return
    present = torch.tensor([float(p.grad is not None) for p in parameters])
    counts = sum_over_ranks(accelerator, present.to(accelerator.device)).tolist()
    for parameter, count in zip(parameters, counts, strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
