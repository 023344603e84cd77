"""Atomic writes, sharded arrays, checkpoints and training logs."""
