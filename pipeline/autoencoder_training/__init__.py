"""Trains, evaluates and converts autoencoders."""
