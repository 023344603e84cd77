"""Baselines of JKO-iFlow: other models of a density on vectors, behind one interface."""
