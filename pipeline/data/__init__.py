"""Data sets of images and the caches of their latents."""
