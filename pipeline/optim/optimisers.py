"""The optimisers of all trainings: Adam, or Muon for matrices and Adam for the rest.

Muon orthogonalises the step of every matrix, so that all directions are learnt at the same rate.
The weight of a convolution counts as a matrix (outputs, inputs · positions). Muon and the scale of
its steps are PyTorch's. With that scale Adam's learning rates are about right; a few times larger
ones did best here (docs/ablations.md).

Reference: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
arXiv:2502.16982, section 2.2 for the scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config.autoencoder_recipe import OPTIMIZERS

_MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class MuonAdam:
    """Muon for the weights of linear and convolutional layers, Adam for everything else.

    Args:
        module: what is trained; parameters that need no gradient are left out.
        lr: learning rate of both, in Adam's terms.
        betas: Adam's.
    """

    def __init__(self, module: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, _MATRICES)]
        chosen = {id(w): w for w in (layer.weight for layer in layers) if w.requires_grad}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        self.weights = list(chosen.values())
        # the same memory, as matrices
        self.matrices = [nn.Parameter(weight.data.flatten(1)) for weight in self.weights]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError("Muon needs weights that are contiguous in memory")
        self.muon = torch.optim.Muon(
            self.matrices, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.Adam(rest, lr, betas)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both."""
        return self.muon.param_groups + self.adam.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for weight in self.weights:
            weight.grad = None
        self.adam.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Make a step of both; a weight without a gradient stays."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def make_optimizer(
    kind: str, module: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Adam | MuonAdam:
    """Build an optimiser of what needs a gradient in a module.

    Args:
        kind: one of `OPTIMIZERS`.
        module: what is trained, on its device already.
        lr: learning rate.
        betas: Adam's.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {kind!r}")
    if kind == "muon":
        return MuonAdam(module, lr, betas)
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr, betas)
