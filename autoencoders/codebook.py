"""Codebook look-up: nearest entries in bounded memory, and the Gumbel quantiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# distances in memory at a time: 2^24 floats are 64 MiB
_MAX_DISTANCES = 1 << 24


def nearest_indices(z: Tensor, entries: Tensor) -> Tensor:
    """Find the nearest entry (n_embed, C_z) of every vector of latents (B, C_z, H_z, W_z).

        argmin_j ‖z − e_j‖² = argmin_j ‖e_j‖² − 2 z·e_j

    The indices are int64 (B, H_z, W_z). Vectors are processed in slices, because the full table of
    distances of a 256x256 image and 16384 entries would take gigabytes.
    """
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    square = entries.square().sum(1)
    rows = max(1, _MAX_DISTANCES // len(entries))
    parts = [
        torch.addmm(square, part, entries.t(), alpha=-2.0).argmin(1) for part in flat.split(rows)
    ]
    indices = torch.cat(parts)
    return indices.view(z.shape[0], *z.shape[2:])


def look_up(indices: Tensor, entries: Tensor) -> Tensor:
    """Look up the codebook entries (B, C_z, H_z, W_z) of indices (B, H_z, W_z)."""
    return entries[indices].permute(0, 3, 1, 2).contiguous()


class GumbelQuantizer(nn.Module):
    """Codebook of a Gumbel VQGAN, evaluated at its mode.

    Training samples an entry from softmax((logits + Gumbel noise) / τ), logits = proj(z). This
    class takes the most likely entry argmax_j logits_j, so that decoding is a function of the
    latent. (The official code samples noise in evaluation, too.)

    Reference: Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax", 2017.
    """

    def __init__(self, n_embed: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, n_embed, 1)
        self.embed = nn.Embedding(n_embed, channels)

    def indices(self, z: Tensor) -> Tensor:
        """Find the most likely entries (B, H_z, W_z) of latents (B, C_z, H_z, W_z)."""
        return torch.cat([self.proj(part).argmax(1) for part in z.split(1)])
