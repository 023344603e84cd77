"""The plot of the blocks' movements."""

from __future__ import annotations

from pathlib import Path

from eval.plots import movement_bars
from pipeline.runs.manifest import Manifest
from pipeline.runs.passes import labels
from pipeline.storage import atomic


def plot_movement(manifest: Manifest, path: Path) -> None:
    """Plot the W2 movement of every block as bars, one shade for each complete pass, as PNG."""
    named = zip(labels(manifest.passes), manifest.passes, strict=True)
    bars = [(name, entry.summary.movement) for name, entry in named if entry.summary is not None]
    titles, movements = [name for name, _ in bars], [movement for _, movement in bars]
    atomic.write_with(path, lambda file: movement_bars(file, movements, titles))
