"""Exports, model cards and reports of a run."""
