"""Layers that the velocity networks share: time features, class features and embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flows.errors import FlowError
from flows.networks.config import VelocityConfig


class ClassEmbedding(nn.Module):
    """A learned vector for each class, added to features: x + e(y).

    Args:
        classes: number of classes; the label ``classes`` is the null label. 0 adds nothing.
        features: number of features of x.
        zero: whether e starts at 0.
    """

    def __init__(self, classes: int, features: int, zero: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, features) if classes else None
        if self.embedding is not None and zero:
            nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Add the embeddings of the labels to x.

        Args:
            x: features (F,), (1, F) or (B, F).
            labels: int64 (B,) in [0, classes]; None without classes.

        Returns:
            x + e(labels), (B, F); x itself without classes.

        Raises:
            FlowError: labels are missing, or given without classes.
        """
        if (self.embedding is None) != (labels is None):
            need = "no labels, for it has no classes" if self.embedding is None else "labels"
            raise FlowError(f"this velocity network needs {need}")
        return x if self.embedding is None else x + self.embedding(labels)


class TimeFeatures(nn.Module):
    """Sines and cosines of t with geometrically spaced frequencies from π/2 to 2π.

    The fastest has one period in a block. Higher frequencies would vary between the nodes of a
    training grid, which has few sub-intervals, and so be integrated wrongly.

    Args:
        features: number of features F, even.
        classes: number of classes, whose embeddings are added to the features.
    """

    omega: Tensor

    def __init__(self, features: int, classes: int = 0) -> None:
        super().__init__()
        self.label = ClassEmbedding(classes, features)
        half = features // 2
        exponents = torch.linspace(0, 1, half, dtype=torch.float64)
        omega = (math.pi / 2) * 4.0**exponents
        self.register_buffer("omega", omega.to(torch.get_default_dtype()), persistent=False)

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Compute (sin ω t, cos ω t) + e(y).

        Args:
            t: times, 0-d or (B,).
            labels: int64 (B,); None without classes.

        Returns:
            the features, (B, F); (1, F) for a 0-d time without labels.
        """
        phase = t.reshape(-1, 1).to(self.omega.dtype) * self.omega
        return self.label(torch.cat([phase.sin(), phase.cos()], dim=1), labels)


class ClassFeatures(nn.Module):
    """The class embedding alone, for an autonomous network with classes.

    Args:
        features: number of features F.
        classes: number of classes.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.size = features
        self.label = ClassEmbedding(classes, features)

    def forward(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return e(y), (B, F), for labels int64 (B,); of t only the type and device are used."""
        return self.label(t.new_zeros(1, self.size), labels)


class NoFeatures(nn.Module):
    """The absence of features, for an autonomous network without classes."""

    def forward(self, t: Tensor, labels: Tensor | None = None) -> None:
        """Return None.

        Args:
            t: times, 0-d or (B,); they are not used.
            labels: None.

        Raises:
            FlowError: labels are given.
        """
        if labels is not None:
            raise FlowError("this velocity network needs no labels, for it has no classes")


def context_features(config: VelocityConfig) -> TimeFeatures | ClassFeatures | NoFeatures:
    """Build the features of the time and the class that a network is conditioned on.

    Args:
        config: ``time_features``, ``autonomous`` and ``classes`` apply.
    """
    if not config.autonomous:
        return TimeFeatures(config.time_features, config.classes)
    if config.classes:
        return ClassFeatures(config.time_features, config.classes)
    return NoFeatures()


def zero_(layer: nn.Linear | nn.Conv2d) -> None:
    """Set the weight and the bias of a layer to zero, so that its output is zero."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def reset_classes(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Replace the class embeddings in a state dict by those of a network with other classes.

    Every class of the network starts from the null label's vector in the state dict, or from zero
    if the state dict has no classes.

    Args:
        state: a state dict of the network's architecture with other classes; tensors of the
            shapes of its weights, embeddings (classes + 1, F).
        network: the network with the new classes; its weights are not read.

    Returns:
        a state dict that the network loads.
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
