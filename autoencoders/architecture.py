"""The architecture of a taming autoencoder, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

FLAVOURS = ("kl", "vq", "gumbel")
# taming normalises with 32 groups, so every width must be a multiple of 32
_GROUPS = 32
# left out of a description at these values, so that older weights keep their fingerprints
_LATER = {"resolution": 0, "attention": True, "levels": (0, 255), "sharpen": 0.0}


@dataclass(frozen=True)
class TamingConfig:
    """Architecture of a taming autoencoder.

    Attributes:
        flavour: "kl" (Gaussian posterior), "vq" (codebook, nearest entry) or "gumbel" (codebook,
            most likely entry; for converted checkpoints, not trained here).
        image_shape: (C, H, W) of the images.
        canvas: side of the square canvas the image is centred on; 0 takes the image as it is.
        patch: p x p pixels folded into channels before the encoder; 1 folds nothing.
        ch: base width, a multiple of 32.
        ch_mult: width multiplier per resolution; each further entry halves the resolution.
        num_res_blocks: residual blocks per resolution.
        attn_resolutions: resolutions with self-attention (besides the middle, always).
        z_channels: channels the encoder puts out.
        embed_dim: channels of the latents (C_z).
        n_embed: codebook entries (VQ, Gumbel).
        commitment: weight of the commitment term in the codebook loss (VQ).
        dropout: dropout in the residual blocks.
        resolution: what `attn_resolutions` counts from, whatever the size of the images (the
            networks are convolutional); 0 takes the height of the images.
        attention: False for no attention at all, not even in the middle.
        levels: darkest and brightest grey level that is decoded. Decoded images saturate there,
            as scanned ink and paper do, instead of hovering around the level: FID sees the
            difference of a few grey levels.
        sharpen: strength of the unsharp mask on decoded images (see `autoencoders.sharpen`);
            `autoencoder_training.sharpen` measures it.
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
        if self.flavour not in FLAVOURS:
            raise ValueError(f"flavour must be one of {', '.join(FLAVOURS)}, not {self.flavour!r}")
        if self.ch < _GROUPS or self.ch % _GROUPS:
            raise ValueError(f"ch must be a multiple of {_GROUPS}, not {self.ch}")
        if self.flavour == "gumbel" and self.z_channels != self.embed_dim:
            raise ValueError(
                f"a gumbel codebook needs z_channels = embed_dim, not {self.z_channels} and "
                f"{self.embed_dim}"
            )
        if not 0 <= self.levels[0] < self.levels[1] <= 255:
            raise ValueError(f"levels must be two grey levels, darker first, not {self.levels}")
        if not 0.0 <= self.sharpen < 1.0:
            raise ValueError(f"sharpen must lie in [0, 1), not {self.sharpen}")
        _, height, width = self.image_shape
        rows, columns = self.canvas_shape
        if min(rows - height, columns - width) < 0 or (rows - height) % 2 or (columns - width) % 2:
            raise ValueError(
                f"canvas {self.canvas} cannot centre images of {height}x{width}; it must be at "
                "least as large and differ from them by an even number"
            )
        if self.patch < 1 or rows % self.factor or columns % self.factor:
            raise ValueError(
                f"canvas {rows}x{columns} cannot be divided by patch {self.patch} and halved "
                f"{len(self.ch_mult) - 1} times; change canvas, patch or ch_mult"
            )

    @property
    def limits(self) -> tuple[float, float]:
        """`levels` on the scale of images, [-1, 1]."""
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
        """Pixels of the canvas along one side of a latent pixel."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C_z, H_z, W_z)."""
        rows, columns = self.canvas_shape
        return (self.embed_dim, rows // self.factor, columns // self.factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, enough to build it again (see `config_from_description`)."""
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in asdict(self).items()
            if k not in _LATER or v != _LATER[k]
        }


def config_from_description(description: dict[str, Any]) -> TamingConfig:
    """The architecture from what `describe` gave (lists become tuples again).

    Raises:
        ValueError: a key is unknown or missing its type.
    """
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description.items()
    }
    values.pop("kind", None)
    try:
        return TamingConfig(**values)
    except TypeError as error:
        raise ValueError(f"not a description of a taming autoencoder: {error}") from error
