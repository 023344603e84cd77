"""Atomic writes, sharded arrays, files at addresses, checkpoints and training logs."""
