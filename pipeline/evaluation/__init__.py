"""Evaluation: images to metrics."""
