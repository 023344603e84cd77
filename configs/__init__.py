"""Packaged configurations: `--config NAME` finds them anywhere."""
