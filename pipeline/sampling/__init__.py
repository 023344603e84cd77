"""Sampling: run directory to images."""
