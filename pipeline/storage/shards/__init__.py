"""Stores: arrays of many samples as safetensors shards with a manifest."""
