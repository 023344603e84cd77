"""Checkpoints of taming-transformers and latent-diffusion, read safely and converted."""
