"""Autoencoder models and weights, behind one protocol (see `autoencoders.base`)."""
