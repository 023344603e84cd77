"""Safe conversion of checkpoints of taming-transformers and latent-diffusion."""
