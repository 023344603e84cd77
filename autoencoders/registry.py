"""Name → constructor of an autoencoder: an explicit table, nothing is discovered."""

from __future__ import annotations

from collections.abc import Callable

from autoencoders import diffusers
from autoencoders import weights as stored
from autoencoders.adapt import Adaptation, adapt
from autoencoders.base import Autoencoder
from autoencoders.identity import IdentityAutoencoder


def _pretrained(weights: str | None, image_shape: tuple[int, int, int], own: bool) -> Autoencoder:
    if weights is None:
        raise ValueError("autoencoder.weights must name shipped weights or a file; it is null")
    return stored.load_weights(stored.locate_weights(weights))


def _diffusers(weights: str | None, image_shape: tuple[int, int, int], own: bool) -> Autoencoder:
    if weights is None:
        raise ValueError("autoencoder.weights must name a folder or a hub id; it is null")
    return diffusers.load_diffusers(weights, None if own else image_shape[1:])


def _identity(weights: str | None, image_shape: tuple[int, int, int], own: bool) -> Autoencoder:
    return IdentityAutoencoder(image_shape)


#: from weights, the shape of the images, and whether the weights' own size is wanted instead
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
    """The autoencoder of a name, ready to encode images of a shape.

    Args:
        name: pretrained, diffusers or identity.
        weights: a shipped name or a path (pretrained), a folder or a hub id (diffusers).
        image_shape: (C, H, W) of the images at hand.
        adaptation: what may be done where the shapes differ; None does nothing.

    Raises:
        ValueError: unknown name or weights, or made for images of another shape.
    """
    if name not in CONSTRUCTORS:
        raise ValueError(
            f"unknown autoencoder {name!r}; choose one of {', '.join(sorted(CONSTRUCTORS))}"
        )
    adaptation = adaptation or Adaptation()
    side = adaptation.size
    seen = (image_shape[0], side, side) if side else image_shape
    own = adaptation.fit == "resize" and not side
    model = CONSTRUCTORS[name](weights, seen, own)
    try:
        return adapt(model, image_shape, adaptation)
    except ValueError as error:
        raise ValueError(f"{weights or name}: {error}") from error
