"""Faults on purpose: damaged files, killed processes, power cuts and bad input, counted."""
