"""Joins flows, autoencoders and eval: configuration, data, caches, training, command line."""
