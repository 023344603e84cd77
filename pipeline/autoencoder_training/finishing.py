"""What is done to a trained autoencoder before it is kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autoencoders.base import to_float
from autoencoders.sharpen import calibrate
from autoencoders.taming import TamingAutoencoder


@torch.inference_mode()
def sharpened(model: TamingAutoencoder, images: Tensor) -> TamingAutoencoder:
    """The same autoencoder, whose decoded images have as much detail as the data.

    Its latents stay what they were; reconstructions are of posterior samples, as the flow's.

    Args:
        model: a frozen autoencoder.
        images: uint8 (B, C, H, W), of the training set.

    Returns:
        A new frozen autoencoder with `config.sharpen` measured over `images`.
    """
    plain = TamingAutoencoder(replace(model.config, sharpen=0.0))
    plain.load_state_dict(model.state_dict())
    plain.freeze()
    x = to_float(images)
    z = plain.encode(x).sample(torch.Generator().manual_seed(0))
    strength = calibrate(plain.decode(z), x, model.config.limits)
    made = TamingAutoencoder(replace(model.config, sharpen=strength))
    made.load_state_dict(model.state_dict())
    return made.freeze()
