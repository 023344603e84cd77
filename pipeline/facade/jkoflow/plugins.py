"""Registration of a caller's own velocity networks, autoencoders and data sets."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch

from autoencoders import registry as autoencoders
from flows.networks import registry as velocities
from flows.networks.base import Velocity
from pipeline.config.data import IMAGE_SETS
from pipeline.data import datasets
from pipeline.data.image_set import ImageSet, image_set_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from flows.networks.config import VelocityConfig
    from pipeline.config.data import DataConfig

#: attributes of an autoencoder
_PROTOCOL = (
    "image_shape", "latent_shape", "stochastic", "fingerprint", "encode", "decode", "describe",
)  # fmt: skip
F = TypeVar("F", bound=Callable[..., Any])
Kind = Literal["velocity", "autoencoder", "dataset"]


def register(kind: Kind, name: str) -> Callable[[F], F]:
    """Register a class or a function under a name that configurations use; a decorator.

        @jkoflow.register("velocity", "my-net")        velocity.kind=my-net
        class MyNet(jkoflow.Velocity):
            def __init__(self, config, shape): …       VelocityConfig, (C, H, W) or (D,)

    * velocity: called with a `VelocityConfig` and the shape of a sample; returns a `Velocity`.
    * autoencoder: called with `autoencoder.weights` and the image shape (C, H, W); returns an
      `nn.Module` with the protocol `autoencoders.base.Autoencoder`.
    * dataset: called with the section `data` and a split; returns images, uint8 (n, C, H, W), and
      their labels (n,) or None.

    Args:
        kind: velocity, autoencoder or dataset.
        name: new, of letters, digits, hyphens and underscores.

    Raises:
        UserError: an unknown kind, or a name that is taken.
    """
    if kind not in ("velocity", "autoencoder", "dataset"):
        raise UserError(f"the kind is {kind!r}; expected velocity, autoencoder or dataset")
    names: dict[str, Collection[str]] = {
        "velocity": velocities.KINDS,
        "autoencoder": autoencoders.NAMES,
        "dataset": IMAGE_SETS,
    }
    if name in names[kind]:
        raise UserError(f"the {kind} {name!r} is registered already; choose another name")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"the name is {name!r}; expected letters, digits, - and _")

    def add(factory: F) -> F:
        if kind == "velocity":
            velocities.KINDS[name] = _network(name, _guarded(kind, name, factory))
        elif kind == "autoencoder":
            autoencoders.NAMES[name] = _autoencoder(name, _guarded(kind, name, factory))
        else:
            IMAGE_SETS.append(name)
            datasets.DATASETS[name] = _loader(name, _guarded(kind, name, factory))
        return factory

    return add


def _guarded(kind: str, name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that turns the errors of a caller's function into one sentence."""

    def call(*arguments: Any) -> Any:  # noqa: ANN401 - of any kind
        try:
            return factory(*arguments)
        except Exception as error:
            raise UserError(
                f"the {kind} {name} could not be made ({type(error).__name__}: {error}); repair "
                "what is registered under this name"
            ) from error

    return call


def _network(
    name: str, factory: Callable[[VelocityConfig, tuple[int, ...]], Any]
) -> Callable[[VelocityConfig, tuple[int, ...]], Velocity]:
    """Return the function that builds a caller's network and evaluates it once."""

    def build(config: VelocityConfig, shape: tuple[int, ...]) -> Velocity:
        network = factory(config, shape)
        if not isinstance(network, Velocity):
            raise UserError(
                f"the velocity {name} is of the type {type(network).__name__}; expected a "
                "jkoflow.Velocity; derive its class from that one"
            )
        if (network.shape, network.classes) != (tuple(shape), config.classes):
            raise UserError(
                f"the velocity {name} has the shape {network.shape} and {network.classes} "
                f"classes; expected {tuple(shape)} and {config.classes}; pass shape and "
                "config.classes to Velocity.__init__"
            )
        if not config.image_channels:
            _evaluate(name, network)
        return network

    return build


def _evaluate(name: str, network: Velocity) -> None:
    """Evaluate a network at samples 0, at one time and at a time for each sample."""
    z = torch.zeros((2, *network.shape))
    if z.is_meta:  # only sizes are asked for
        return
    labels = torch.zeros(2, dtype=torch.int64) if network.classes else None
    training = network.training
    network.eval()
    for t in (torch.zeros(()), torch.zeros(2)):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                shape = tuple(network(t, z, labels).shape)
        except Exception as error:
            raise UserError(
                f"the velocity {name} could not be evaluated at t of the shape {tuple(t.shape)} "
                f"and z of the shape {tuple(z.shape)} ({type(error).__name__}: {error}); repair "
                "its forward"
            ) from error
        if shape != z.shape:
            raise UserError(
                f"the shape of the velocity {name} is {shape} at z of the shape "
                f"{tuple(z.shape)}; expected that of z; repair its forward"
            )
    network.train(training)


def _autoencoder(name: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that builds a caller's autoencoder and checks its attributes."""

    def build(weights: str | None, image_shape: tuple[int, int, int]) -> Any:  # noqa: ANN401
        model = factory(weights, image_shape)
        absent = [attribute for attribute in _PROTOCOL if not hasattr(model, attribute)]
        if absent:
            raise UserError(
                f"the autoencoder {name} has no {', '.join(absent)}; expected the attributes of "
                "autoencoders.base.Autoencoder; add them"
            )
        return model

    return build


def _loader(name: str, factory: Callable[..., Any]) -> Callable[[DataConfig, str], ImageSet]:
    """Return the function that opens a data set of a caller's function."""

    def load(data: DataConfig, split: str) -> ImageSet:
        result = factory(data, split)
        if not isinstance(result, tuple) or len(result) != 2:
            raise UserError(
                f"the data set {name} returns {type(result).__name__}; expected (images, labels) "
                "or (images, None)"
            )
        images, labels = result
        pixels = np.asarray(images)
        classes = None if labels is None else np.asarray(labels)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or not len(pixels):
            raise UserError(
                f"the data set {name} has images {pixels.dtype} {pixels.shape}; expected uint8 "
                "(n, C, H, W)"
            )
        if classes is not None and (
            classes.shape != (len(pixels),) or classes.dtype.kind not in "iu"
        ):
            raise UserError(
                f"the data set {name} has labels {classes.dtype} {classes.shape}; expected "
                f"{len(pixels)} whole numbers"
            )
        limit = len(pixels) if data.limit is None else data.limit
        rows = None if classes is None else classes[:limit]
        return image_set_of(pixels[:limit], rows, name, split)

    return load
