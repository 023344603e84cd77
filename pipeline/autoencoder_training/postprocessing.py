"""Postprocessing of a trained autoencoder: unused latent channels and the unsharp mask."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autoencoders.base import to_float
from autoencoders.sharpen import laplacian, sharpen
from autoencoders.taming import TamingAutoencoder

#: upper limit of the mask's strength
MAX_STRENGTH = 0.5
_HALVINGS = 30
#: images that are encoded at once
_BATCH = 10


@torch.inference_mode()
def without_unused_channels(
    model: TamingAutoencoder, images: Tensor, least_nats: float
) -> TamingAutoencoder:
    """Remove the latent channels of a frozen KL autoencoder with less information than a limit.

    The information of a channel is KL(q(z|x) ‖ N(0, 1)) in nats, averaged over positions and
    images, uint8 (B, C, H, W). See `select_channels`.
    """
    total = torch.zeros(model.config.embed_dim)
    for part in images.split(_BATCH):
        moments = model.encode(to_float(part))
        assert moments.log_var is not None
        mean, log_var = moments.mean, moments.log_var
        total += 0.5 * (mean**2 + log_var.exp() - 1.0 - log_var).mean((2, 3)).sum(0)
    nats = total / len(images)
    return select_channels(model, (nats >= least_nats).nonzero().flatten().tolist())


@torch.no_grad()
def select_channels(model: TamingAutoencoder, channels: list[int]) -> TamingAutoencoder:
    """Select latent channels of a frozen KL autoencoder, in order; the others are fixed at zero.

    Only the 1x1 convolutions at the latents change. This is exact for channels that are always
    zero, and harmless for channels that the decoder ignores. If all are kept, `model` is returned.

    Raises:
        ValueError: the autoencoder has a codebook, or no channel is kept.
    """
    if not model.stochastic:
        raise ValueError(f"the flavour is {model.config.flavour}; expected kl to select channels")
    count = model.config.embed_dim
    if channels == list(range(count)):
        return model
    if not channels:
        raise ValueError(
            f"all {count} latent channels are without information; expected at least one with; "
            "lower training.kl_weight"
        )
    smaller = TamingAutoencoder(replace(model.config, embed_dim=len(channels)))
    tensors = dict(model.state_dict())
    rows = channels + [count + channel for channel in channels]  # means, then log-variances
    tensors["quant_conv.weight"] = tensors["quant_conv.weight"][rows]
    tensors["quant_conv.bias"] = tensors["quant_conv.bias"][rows]
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"][:, channels]
    smaller.load_state_dict(tensors)
    return smaller.freeze()


@torch.inference_mode()
def with_unsharp_mask(model: TamingAutoencoder, images: Tensor) -> TamingAutoencoder:
    """Add the unsharp mask that gives decoded images the detail of training images.

    The images are uint8 (B, C, H, W). The latents do not change. Reconstructions are of posterior
    samples, as those of a flow.
    """
    unmasked = _with_strength(model, 0.0)
    rng = torch.Generator().manual_seed(0)
    decoded = [
        unmasked.decode(unmasked.encode(to_float(part)).sample(rng))
        for part in images.split(_BATCH)
    ]
    strength = mask_strength(torch.cat(decoded), to_float(images), model.config.limits)
    return _with_strength(model, strength)


def _with_strength(model: TamingAutoencoder, strength: float) -> TamingAutoencoder:
    """Copy an autoencoder with another strength of the mask; the copy is frozen."""
    copied = TamingAutoencoder(replace(model.config, sharpen=strength))
    copied.load_state_dict(model.state_dict())
    return copied.freeze()


def mask_strength(decoded: Tensor, images: Tensor, limits: tuple[float, float]) -> float:
    """Measure the strength a at which decoded images x̂ (B, C, H, W) have the detail of images x.

        mean|Δ(x̂ − a Δx̂)| = mean|Δx|

    The left side grows with a until pixels saturate, so a is found by bisection in [0,
    `MAX_STRENGTH`] and rounded to three decimals. It is 0 if x̂ has enough detail.
    """
    detail = laplacian(images).abs().mean()

    def too_weak(strength: float) -> bool:
        masked = sharpen(decoded, strength).clamp(*limits)
        return bool(laplacian(masked).abs().mean() < detail)

    low, high = 0.0, MAX_STRENGTH
    if not too_weak(low):
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_weak(middle) else (low, middle)
    return round(high, 3)
