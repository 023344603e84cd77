"""Optimisers, the moving average and the learning-rate schedule of every training."""
