"""Shipped autoencoder weights (safetensors) and their cards."""
