"""Autoencoders: images to latents and back, behind one protocol (see `autoencoders.base`)."""
