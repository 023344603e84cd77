"""Records of flow.json for tests: the manifest of generated samples, and a row of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autoencoders.adapt import Adaptation
from flows.spec import BlockSpec
from pipeline.data.standardisation import Standardisation
from pipeline.runs.manifest import AutoencoderRecord, DataRecord, Manifest
from pipeline.runs.passes import BlockRow
from pipeline.storage import atomic


def synthetic_manifest(name: str, shape: tuple[int, ...]) -> Manifest:
    """The manifest of samples that no autoencoder made, though it names one."""
    return Manifest(
        name,
        shape,
        Standardisation(torch.zeros(shape[0]), torch.ones(shape[0])),
        DataRecord("synthetic", "train", "none"),
        autoencoder=AutoencoderRecord("none", None, "none", (1, 2, 2), Adaptation()),
    )


def rewrite(path: Path, text: str) -> None:
    """Write a file of a run as jkoflow writes it, so that its seal knows the new content."""
    atomic.write_bytes(path, text.encode())


def block_row(h: float | None, gamma: float | None, **values: Any) -> BlockRow:
    """The row of a finished block."""
    about: dict[str, Any] = {
        "iterations": 1, "lr": 0.1, "movement": 1.0, "ter": 0.0, "seconds": 0.0, "parameters": 1,
        "terms": {"total": 0.0, "potential": 0.0, "neg_log_det": 0.0}, "stage": "stages/stage-01",
    }  # fmt: skip
    return BlockRow(
        "blocks/block-00.safetensors", "0" * 64, h, gamma, "jko", BlockSpec(), **(about | values)
    )
