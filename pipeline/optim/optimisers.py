"""Optimisers of all trainings: Adam, or Muon for weight matrices and Adam for the rest.

Muon orthogonalises the step of every matrix, so that it learns all directions at one pace. A
convolution's weight is a matrix of (outputs, inputs · kernel positions).

Reference: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
arXiv:2502.16982, section 2.2 for the scale of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.mixed_precision import has_bfloat16
from pipeline.config.training import OPTIMIZERS

_MATRICES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
#: coefficients of X ← a X + (b A + c A²) X with A = X Xᵀ, and the iterations (Jordan et al.)
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32; PyTorch's does it in bfloat16.

    A processor without bfloat16 instructions emulates them. There PyTorch's Muon takes most of
    the time of a training.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Make one step: W ← W − 0.2 η √max(W.shape) · orthogonalised momentum."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = _orthogonalise(matrix.grad.lerp(average, group["momentum"]), group["eps"])
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
        return None


def _orthogonalise(matrix: Tensor, eps: float) -> Tensor:
    """Move the singular values of a matrix near 1 by the quintic Newton–Schulz iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonalise(matrix.T, eps).T
    a, b, c = _NEWTON_SCHULZ
    result = matrix / matrix.norm().clamp(min=eps)
    for _ in range(_ITERATIONS):
        gram = result @ result.T
        result = torch.addmm(
            result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a
        )
    return result


class MuonAdam:
    """Optimiser with Muon for weights of linear and convolutional layers, and Adam for the rest.

    The learning rate is on Adam's scale. Parameters without requires_grad are ignored.

    Raises:
        ValueError: a weight is not contiguous.
    """

    def __init__(self, module: nn.Module, lr: float, betas: tuple[float, float]) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, _MATRICES)]
        chosen = {id(w): w for w in (layer.weight for layer in layers) if w.requires_grad}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        self.weights = list(chosen.values())
        # matrices share the memory of the weights; a group may be empty, an optimiser may not
        self.matrices = [nn.Parameter(weight.data.flatten(1)) for weight in self.weights]
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            if weight.data_ptr() != matrix.data_ptr():
                raise ValueError(
                    f"a weight has the strides {weight.stride()}; expected contiguous memory for "
                    "Muon"
                )
        fast = all(has_bfloat16(weight.device) for weight in self.weights)
        muon = torch.optim.Muon if fast else Float32Muon
        self.muon = muon(
            [{"params": self.matrices}], lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        self.adam = torch.optim.Adam([{"params": rest}], lr, betas)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of both optimisers."""
        return self.muon.param_groups + self.adam.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        for weight in self.weights:
            weight.grad = None
        self.adam.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Make one step of both; weights without a gradient do not change."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimisers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def make_optimizer(
    kind: str, module: nn.Module, lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Adam | MuonAdam:
    """Build an optimiser, of a kind in `OPTIMIZERS`, of the parameters with requires_grad.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"the optimizer is {kind!r}; expected one of {', '.join(OPTIMIZERS)}")
    if kind == "muon":
        return MuonAdam(module, lr, betas)
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr, betas)
