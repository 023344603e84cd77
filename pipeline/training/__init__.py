"""Training: latent cache to run directory."""
