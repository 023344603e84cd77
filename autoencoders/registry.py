"""Name → constructor of an autoencoder: an explicit table, nothing is discovered."""

from __future__ import annotations

from collections.abc import Callable

from autoencoders import weights as stored
from autoencoders.base import Autoencoder
from autoencoders.identity import IdentityAutoencoder


def _pretrained(weights: str | None, image_shape: tuple[int, int, int]) -> Autoencoder:
    if weights is None:
        raise ValueError("autoencoder.weights must name shipped weights or a file; it is null")
    return stored.load(stored.locate(weights))


def _identity(weights: str | None, image_shape: tuple[int, int, int]) -> Autoencoder:
    return IdentityAutoencoder(image_shape)


CONSTRUCTORS: dict[str, Callable[[str | None, tuple[int, int, int]], Autoencoder]] = {
    "pretrained": _pretrained,
    "identity": _identity,
}


def build(name: str, weights: str | None, image_shape: tuple[int, int, int]) -> Autoencoder:
    """The autoencoder of a name, ready to encode images of a shape.

    Args:
        name: pretrained or identity.
        weights: a shipped name or a path (pretrained).
        image_shape: (C, H, W) of the images at hand.

    Raises:
        ValueError: unknown name or weights, or made for images of another shape.
    """
    if name not in CONSTRUCTORS:
        raise ValueError(
            f"unknown autoencoder {name!r}; choose one of {', '.join(sorted(CONSTRUCTORS))}"
        )
    model = CONSTRUCTORS[name](weights, image_shape)
    if tuple(model.image_shape) != tuple(image_shape):
        raise ValueError(
            f"the autoencoder {weights or name} takes images of shape {tuple(model.image_shape)}, "
            f"but the data set has {tuple(image_shape)}; choose another of the two"
        )
    return model
