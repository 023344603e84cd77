"""The plot of the blocks' movements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval.plots import movement_bars
from pipeline.runs.passes import Pass, labels
from pipeline.storage import atomic


def plot_movement(manifest: dict[str, Any], path: Path) -> None:
    """Bars of the W2 movement of every block, one shade a complete pass, as PNG.

    Args:
        manifest: flow.json, or metrics.json, which knows one pass only.
        path: where the picture goes.
    """
    passes = [Pass.from_dict(plain) for plain in manifest.get("passes", [])]
    names = [
        (name, entry.blocks)
        for name, entry in zip(labels(passes), passes, strict=True)
        if entry.complete
    ]
    groups = names or [("Iter 1", manifest["blocks"])]
    movements = [[row["movement"] for row in rows] for _, rows in groups]
    titles = [name for name, _ in groups]
    atomic.write_with(path, lambda file: movement_bars(file, movements, titles))
