"""Bytes on disk: atomic writes, sharded arrays, checkpoints, training logs."""
