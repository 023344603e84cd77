"""Distillation: fewer blocks, fewer solver steps."""
