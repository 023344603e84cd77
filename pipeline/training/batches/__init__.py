"""Batches of a block in training, and the loss and gradient of its objective on them."""
