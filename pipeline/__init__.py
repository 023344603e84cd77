"""Training, sampling and evaluation of flows on the latents of an autoencoder."""
