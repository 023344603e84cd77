"""The run directory: its files, its manifest, and how it is opened."""
