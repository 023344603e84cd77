"""The configuration of a velocity network: plain data that a run's files keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from flows.errors import FlowError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus20": partial(F.softplus, beta=20),
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
}

#: kinds of network whose samples are grids (C, H, W)
GRID_KINDS = ("conv", "unet", "dit")
_WIDEST = 2**16
_LEVELS = 12


@dataclass(frozen=True)
class VelocityConfig:
    """The kind and the size of a block's network.

    Attributes:
        kind: ``mlp`` | ``resmlp`` | ``conv`` | ``unet`` | ``dit`` | ``linear``.
        width: hidden features (mlp, resmlp, dit) or channels (conv, unet). A list has the
            channels of every level of the unet, from the finest; each level halves the grid. A
            number w is [w, 2w] where the sides are even, and [w] elsewhere.
        depth: hidden layers (mlp, conv), residual layers (resmlp), transformer blocks (dit), or
            residual blocks on each level, each way (unet).
        activation: a key of ``ACTIVATIONS``, or ``default``: the paper's smooth softplus20 for
            mlp and conv, silu for resmlp and unet, gelu-tanh for dit.
        time_features: sines and cosines of t that resmlp, conv, unet and dit see; an even number.
        autonomous: whether the field does not depend on t, so that the network has no time
            features. The default of a run is true under jko and false under other objectives.
            Under jko a field that depends on t can raise the log-det of the training grid without
            bound while its map stays the same.
        heads: attention heads of the dit, at least 1, and of the unet, where 0 leaves attention
            out. The unet attends at its lowest level, and at the others on grids of at most 8x8.
        patch: side p of the p x p patches that the unet folds into channels, and unfolds at its
            output; its levels and its attention see the folded grid. A token of the dit is such a
            patch.
        nets: networks in a block; each covers an equal part of the block's time.
        image_channels: channels K of the image (K, H, W) that conditions a conv, unet or dit; 0
            for an unconditional network.
        classes: classes that condition the network; 0 for an unconditional network.
        class_dropout: probability in [0, 1) that training replaces a sample's class by the null
            label, which guidance needs. Under jko a sample with the null label takes the step of
            all classes together, although the blocks before have moved it with its class.
        zero_init: whether the network starts as v = 0, so that a new block is the identity.

    Raises:
        FlowError: a name is unknown, or a size is out of range.
    """

    kind: str = "resmlp"
    width: int | tuple[int, ...] = 256
    depth: int = 4
    activation: str = "default"
    time_features: int = 32
    autonomous: bool = False
    heads: int = 4
    patch: int = 1
    nets: int = 1
    image_channels: int = 0
    classes: int = 0
    class_dropout: float = field(default=0.1, compare=False)  # it does not change the network
    zero_init: bool = field(default=True, metadata={"key": False})  # not a setting of a run

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name, least, most in (
            ("depth", 1, 2**10), ("patch", 1, 2**10), ("nets", 1, 2**10),
            ("heads", 0, 2**10), ("classes", 0, 2**20), ("image_channels", 0, 2**10),
            ("time_features", 2, 2**12),
        ):  # fmt: skip
            _check_integer(name, getattr(self, name), least, most)
        self._check_width()
        if self.activation not in ("default", *ACTIVATIONS):
            known = ", ".join(("default", *ACTIVATIONS))
            raise FlowError(f"unknown activation {self.activation!r}; choose one of {known}")
        if self.time_features % 2:
            raise FlowError(
                f"velocity.time_features must be even and at least 2, not {self.time_features}"
            )
        if self.image_channels and (self.nets > 1 or self.kind not in GRID_KINDS):
            raise FlowError(
                f"velocity.image_channels is {self.image_channels} for {self.nets} network(s) of "
                f"kind {self.kind}; image conditioning needs a single conv, unet or dit"
            )
        if not 0 <= self.class_dropout < 1:
            raise FlowError(f"velocity.class_dropout must lie in [0, 1), not {self.class_dropout}")

    def _check_width(self) -> None:
        """Check the width, or those of all levels, and make a list a tuple."""
        if isinstance(self.width, (list, tuple)):
            object.__setattr__(self, "width", tuple(self.width))
            if self.kind != "unet" or not 1 <= len(self.widths) <= _LEVELS:
                raise FlowError(
                    f"velocity.width is {list(self.widths)} for the kind {self.kind}; expected a "
                    f"number, or for a unet a list of 1 to {_LEVELS} levels"
                )
        for value in self.widths:
            _check_integer("width", value, 1, _WIDEST)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the levels as they are given: one, or those of a list."""
        return self.width if isinstance(self.width, tuple) else (self.width,)

    def widened(self, factor: int) -> VelocityConfig:
        """Return the configuration of a network whose every width is larger by a factor."""
        wide = tuple(factor * width for width in self.widths)
        return replace(self, width=wide if isinstance(self.width, tuple) else wide[0])

    def activation_or(self, default: str) -> Callable[[Tensor], Tensor]:
        """Return the activation of tensors (…); ``default`` is the key of a kind's own."""
        return ACTIVATIONS[default if self.activation == "default" else self.activation]


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    """Check that a setting is an integer in a range."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise FlowError(f"velocity.{name} must be an integer, not {value!r}")
    if value < least:
        raise FlowError(f"velocity.{name} must be at least {least}, not {value}")
    if value > most:
        raise FlowError(f"velocity.{name} must be at most {most}, not {value}")
