"""Registry of autoencoders: an explicit table from names to constructors."""

from __future__ import annotations

from collections.abc import Callable

from autoencoders import diffusers
from autoencoders import weights as stored
from autoencoders.adapt import Adaptation, adapt
from autoencoders.base import Autoencoder
from autoencoders.identity import IdentityAutoencoder


def _pretrained(
    weights: str | None, image_shape: tuple[int, int, int], native_size: bool
) -> Autoencoder:
    """Load shipped weights or a file."""
    if weights is None:
        raise ValueError("autoencoder.weights is null; expected shipped weights or a file")
    return stored.load_weights(stored.locate_weights(weights))


def _diffusers(
    weights: str | None, image_shape: tuple[int, int, int], native_size: bool
) -> Autoencoder:
    """Load an autoencoder of the diffusers library."""
    if weights is None:
        raise ValueError("autoencoder.weights is null; expected a folder or a hub id")
    return diffusers.load_diffusers(weights, None if native_size else image_shape[1:])


def _identity(
    weights: str | None, image_shape: tuple[int, int, int], native_size: bool
) -> Autoencoder:
    """Build the identity."""
    return IdentityAutoencoder(image_shape)


#: from weights, the image shape, and whether the image size of the weights is used instead
CONSTRUCTORS: dict[str, Callable[[str | None, tuple[int, int, int], bool], Autoencoder]] = {
    "pretrained": _pretrained,
    "diffusers": _diffusers,
    "identity": _identity,
}


def build_autoencoder(
    name: str,
    weights: str | None,
    image_shape: tuple[int, int, int],
    adaptation: Adaptation | None = None,
) -> Autoencoder:
    """Build the autoencoder of a name for images of a shape.

    Args:
        name: pretrained, diffusers or identity.
        weights: a shipped name or a path (pretrained), a folder or a hub id (diffusers).
        image_shape: (C, H, W) of the images.
        adaptation: the changes that are allowed if shapes differ; None allows none.

    Raises:
        ValueError: the name or the weights are unknown, or the image shapes differ.
    """
    if name not in CONSTRUCTORS:
        raise ValueError(
            f"the autoencoder is {name!r}; expected one of {', '.join(sorted(CONSTRUCTORS))}"
        )
    adaptation = adaptation or Adaptation()
    side = adaptation.size
    encoded_shape = (image_shape[0], side, side) if side else image_shape
    native_size = adaptation.fit == "resize" and not side
    model = CONSTRUCTORS[name](weights, encoded_shape, native_size)
    try:
        return adapt(model, image_shape, adaptation)
    except ValueError as error:
        raise ValueError(f"{weights or name}: {error}") from error
