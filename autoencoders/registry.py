"""Autoencoders by name."""

from __future__ import annotations

from collections.abc import Callable

from autoencoders import diffusers
from autoencoders import weights as stored
from autoencoders.adapt import Adaptation, adapt
from autoencoders.base import Autoencoder
from autoencoders.identity import IdentityAutoencoder

#: the names, and the functions (weights, image shape) → autoencoder of those that were registered
NAMES: dict[str, Callable[[str | None, tuple[int, int, int]], Autoencoder] | None] = {
    "diffusers": None,
    "identity": None,
    "pretrained": None,
}


def build_autoencoder(
    name: str,
    weights: str | None,
    image_shape: tuple[int, int, int],
    adaptation: Adaptation | None = None,
) -> Autoencoder:
    """Build the autoencoder of a name for images of a shape.

    The name is pretrained, diffusers, identity, or one that was registered.

    `weights` are a shipped name or a path (pretrained), or a folder or a hub id (diffusers). The
    adaptation is what may change if shapes differ; None allows nothing.

    Raises:
        ValueError: the name or the weights are unknown, or the image shapes differ.
    """
    if name not in NAMES:
        raise ValueError(f"autoencoder.name is {name!r}; expected one of {', '.join(NAMES)}")
    adaptation = adaptation or Adaptation()
    side = adaptation.size
    model: Autoencoder
    registered = NAMES[name]
    if registered is not None:
        model = registered(weights, image_shape)
    elif name == "identity":
        model = IdentityAutoencoder((image_shape[0], side, side) if side else image_shape)
    elif weights is None:
        kinds = {"pretrained": "shipped weights or a file", "diffusers": "a folder or a hub id"}
        raise ValueError(f"autoencoder.weights is null; expected {kinds[name]}")
    elif name == "pretrained":
        model = stored.load_weights(stored.locate_weights(weights))
    else:
        own_size = adaptation.fit == "resize" and not side  # that of the weights
        size = (side, side) if side else image_shape[1:]
        model = diffusers.load_diffusers(weights, None if own_size else size)
    try:
        return adapt(model, image_shape, adaptation)
    except ValueError as error:
        raise ValueError(f"{weights or name}: {error}") from error
