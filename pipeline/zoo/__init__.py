"""Shipped runs (see `jkoflow export`), a folder each: flow.json, config.yaml, blocks, CARD.md."""
