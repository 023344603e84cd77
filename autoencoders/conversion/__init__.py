"""Safe conversion of checkpoints of taming-transformers, latent-diffusion and diffusers."""
