"""Architecture of a taming autoencoder, as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

FLAVOURS = ("kl", "vq", "gumbel")
# taming's group norms have 32 groups, so every width must be a multiple of 32
_GROUPS = 32
_LEVELS = 12
#: largest values of the sizes
_LARGEST = {
    "image_shape": 2**14, "canvas": 2**14, "patch": 2**8, "ch": 2**13, "ch_mult": 2**6,
    "num_res_blocks": 2**6, "attn_resolutions": 2**14, "z_channels": 2**12, "embed_dim": 2**12,
    "n_embed": 2**20, "resolution": 2**14,
}  # fmt: skip
# a description omits these values, so that the shipped weights keep their fingerprints
_OMITTED = {"resolution": 0, "attention": True, "levels": (0, 255), "sharpen": 0.0}


@dataclass(frozen=True)
class TamingConfig:
    """Architecture of a taming autoencoder.

    Attributes:
        flavour: "kl" (Gaussian posterior), "vq" (codebook, nearest entry) or "gumbel" (codebook,
            most likely entry; only for converted checkpoints).
        image_shape: (C, H, W) of the images.
        canvas: side of the square canvas on which the image is centred; 0 is without a canvas.
        patch: p x p pixels are folded into channels before the encoder; 1 is without folding.
        ch: base width, a multiple of 32.
        ch_mult: width multiplier of each resolution; each further entry halves the resolution.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention, in addition to the middle.
        z_channels: output channels of the encoder.
        embed_dim: channels of the latents (C_z).
        n_embed: codebook entries (VQ, Gumbel).
        commitment: weight of the commitment term in the codebook loss (VQ).
        dropout: dropout in the residual blocks.
        resolution: the input resolution that `attn_resolutions` refers to; 0 takes the rows that
            the encoder sees, the height of the images (or of the canvas) divided by `patch`.
        attention: False removes all attention, including the middle.
        levels: darkest and brightest grey level of decoded images, which are clamped to them. FID
            sees differences of a few grey levels between ink or paper and a decoded image.
        sharpen: strength of the unsharp mask on decoded images (see `autoencoders.sharpen`).
    """

    flavour: str = "kl"
    image_shape: tuple[int, int, int] = (1, 28, 28)
    canvas: int = 0
    patch: int = 1
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 4
    embed_dim: int = 4
    n_embed: int = 512
    commitment: float = 0.25
    dropout: float = 0.0
    resolution: int = 0
    attention: bool = True
    levels: tuple[int, int] = (0, 255)
    sharpen: float = 0.0

    def __post_init__(self) -> None:
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            several = isinstance(getattr(type(self), name), tuple)
            values = value if several else (value,)
            whole = isinstance(values, tuple) and all(
                type(part) is int and 0 <= part <= most for part in values
            )
            if not whole:
                raise ValueError(f"{name} is {value!r}; expected integers from 0 to {most}")
        if not 1 <= len(self.ch_mult) <= _LEVELS or len(self.image_shape) != 3:
            raise ValueError(
                f"ch_mult is {self.ch_mult} and image_shape {self.image_shape}; expected 1 to "
                f"{_LEVELS} multipliers and (C, H, W)"
            )
        if self.flavour not in FLAVOURS:
            raise ValueError(f"flavour is {self.flavour!r}; expected one of {', '.join(FLAVOURS)}")
        if self.ch < _GROUPS or self.ch % _GROUPS:
            raise ValueError(f"ch is {self.ch}; expected a multiple of {_GROUPS}")
        if self.flavour == "gumbel" and self.z_channels != self.embed_dim:
            raise ValueError(
                f"z_channels is {self.z_channels} and embed_dim {self.embed_dim}; expected equal "
                "values for a gumbel codebook"
            )
        if not 0 <= self.levels[0] < self.levels[1] <= 255:
            raise ValueError(
                f"levels is {self.levels}; expected two grey levels in 0…255, the darker one first"
            )
        for name, bound in (("dropout", 1), ("sharpen", 1), ("commitment", math.inf)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < bound:
                raise ValueError(f"{name} is {value!r}; expected a number in [0, {bound})")
        if type(self.attention) is not bool:
            raise ValueError(f"attention is {self.attention!r}; expected true or false")
        _, height, width = self.image_shape
        rows, columns = self.canvas_shape
        if min(rows - height, columns - width) < 0 or (rows - height) % 2 or (columns - width) % 2:
            raise ValueError(
                f"canvas is {self.canvas} for images of {height}x{width}; expected a side that is "
                "larger by an even number of pixels"
            )
        if self.patch < 1 or rows % self.factor or columns % self.factor:
            raise ValueError(
                f"the encoder's input is {rows}x{columns}; expected multiples of {self.factor} "
                f"(patch {self.patch}, halved {len(self.ch_mult) - 1} times); change canvas, "
                "patch or ch_mult"
            )

    @property
    def limits(self) -> tuple[float, float]:
        """`levels` on the scale [-1, 1] of images."""
        return self.levels[0] / 127.5 - 1.0, self.levels[1] / 127.5 - 1.0

    @property
    def canvas_shape(self) -> tuple[int, int]:
        """(rows, columns) of the canvas, in pixels."""
        return (self.canvas, self.canvas) if self.canvas else self.image_shape[1:]

    @property
    def side(self) -> int:
        """Rows of the canvas, in pixels."""
        return self.canvas_shape[0]

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels of the canvas along one side of a latent pixel."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C_z, H_z, W_z)."""
        rows, columns = self.canvas_shape
        return (self.embed_dim, rows // self.factor, columns // self.factor)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, the inverse of `config_from_description`."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
            if k not in _OMITTED or v != _OMITTED[k]
        }


def config_from_description(description: dict[str, Any]) -> TamingConfig:
    """Build the architecture from `TamingAutoencoder.describe` or `TamingConfig.to_dict`.

    Raises:
        ValueError: a key is unknown or a value out of range.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items()
    }
    values.pop("kind", None)
    try:
        return TamingConfig(**values)
    except TypeError as error:
        raise ValueError(
            f"the description is not that of a taming autoencoder: {error}"
        ) from error
