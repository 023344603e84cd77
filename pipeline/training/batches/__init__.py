"""Batches of a block in training: samples, classes, probes, and flow matching on them."""
