"""Layers that the velocity networks share: time features, class features and embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from flows.errors import FlowError
from flows.networks.config import VelocityConfig


class ClassEmbedding(nn.Module):
    """A learned vector for each class, added to features: x + e(y).

    The label ``classes`` is the null label. 0 classes add nothing. With ``zero``, e starts at 0.
    """

    def __init__(self, classes: int, features: int, zero: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, features) if classes else None
        if self.embedding is not None and zero:
            nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Add the embeddings of labels int64 (B,) to features x, (F,), (1, F) or (B, F).

        Raises:
            FlowError: labels are missing, or given without classes.
        """
        if (self.embedding is None) != (labels is None):
            need = "no labels, for it has no classes" if self.embedding is None else "labels"
            raise FlowError(f"this velocity network needs {need}")
        return x if self.embedding is None else x + self.embedding(labels)


class ContextFeatures(nn.Module):
    """The features (sin ω t, cos ω t) + e(y) of the time and the class of a network.

    ω is spaced geometrically from π/2 to 2π, so the fastest has one period in a block. Higher
    frequencies would vary between the nodes of a training grid, and so be integrated wrongly. An
    autonomous network has the class embedding e(y) alone, or no features without classes.
    """

    omega: Tensor | None

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        self.size = config.time_features
        self.empty = config.autonomous and not config.classes
        self.label = ClassEmbedding(config.classes, self.size)
        omega = None
        if not config.autonomous:
            exponents = torch.linspace(0, 1, self.size // 2, dtype=torch.float64)
            omega = ((math.pi / 2) * 4.0**exponents).to(torch.get_default_dtype())
        self.register_buffer("omega", omega, persistent=False)

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor | None:
        """Compute the features (B, F) at times t, 0-d or (B,), and labels int64 (B,).

        They are (1, F) for a 0-d time without labels, and None if there are none.
        """
        if self.omega is None:
            features = self.label(t.new_zeros(1, self.size), labels)
            return None if self.empty else features
        phase = t.reshape(-1, 1).to(self.omega.dtype) * self.omega
        return self.label(torch.cat([phase.sin(), phase.cos()], dim=1), labels)


def has_tangent(x: Tensor) -> bool:
    """Return whether a tensor (…) is differentiated in forward mode."""
    return unpack_dual(x).tangent is not None


def layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute (x − mean) / √(variance + eps) over the last dimension of x (…, W)."""
    if has_tangent(x):
        # PyTorch 2.13 differentiates the forward-mode derivative of layer_norm wrongly: it treats
        # mean and deviation as constants. So the norm is written out.
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred * (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def require_grid(kind: str, shape: tuple[int, ...]) -> None:
    """Check that a sample of a network's kind is a grid (C, H, W).

    Raises:
        FlowError: it is flat.
    """
    if len(shape) != 3:
        raise FlowError(
            f"a {kind} velocity needs samples of shape (C, H, W), found {tuple(shape)}; "
            "use mlp or resmlp for flat samples"
        )


def require_patches(patch: int, shape: tuple[int, ...]) -> None:
    """Check that patches of p x p positions divide a grid (C, H, W).

    Raises:
        FlowError: they do not.
    """
    if shape[1] % patch or shape[2] % patch:
        raise FlowError(f"velocity.patch={patch} does not divide a grid of {shape[1]}x{shape[2]}")


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set the weight and the bias of a layer to zero, so that its output is zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def reset_classes(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Replace the class embeddings in a state dict by those of a network with other classes.

    Every class starts from the null label's vector in the state dict, or from zero if it has no
    classes. The embeddings are (classes + 1, F), and other tensors are unchanged.
    """
    adopted = dict(state)
    for name, module in network.named_modules():
        if isinstance(module, ClassEmbedding) and module.embedding is not None:
            key = f"{name}.embedding.weight"
            table = module.embedding.weight
            adopted[key] = torch.zeros_like(table)
            if key in state:
                adopted[key] += state[key][-1]
    return adopted
