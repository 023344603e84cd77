"""Readers of safetensors files: weights, references, images and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from autoencoders.weights import DESCRIPTION, load_weights
from eval.features.inception_weights import read_weights
from eval.references import read_reference, reference_bytes
from pipeline.integrity.digests import BLANK, stamp
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from tests.eval.moments import stats_from
from tests.faults.readers.parts import statistics
from tests.faults.readers.reader import RNG, Reader
from tests.pipeline.tiny import World


def _state(path: Path) -> Any:
    model = load_weights(path)
    return dict(model.state_dict()), model.describe()


def _reference(path: Path) -> Any:
    reference = read_reference(path)
    return reference.stats.mean, reference.stats.cov, reference.card


def _restamped(notes: Any, tensors: dict[str, torch.Tensor], key: str) -> bytes:
    """A safetensors file whose digest is right, with other notes."""
    if isinstance(notes, dict):
        notes = {**notes, "seal": BLANK}
    return stamp(save(tensors, {key: json.dumps(notes)}))


def tensor_readers(root: Path, world: World) -> Iterator[Reader]:
    from safetensors import safe_open

    weights = world.root / "autoencoder.safetensors"
    yield Reader("autoencoder", root / "a.safetensors", weights.read_bytes(), _state, sealed=True)
    with safe_open(weights, "pt") as file:
        notes = json.loads(file.metadata()[DESCRIPTION])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    yield Reader(
        "autoencoder: description", root / "b.safetensors", notes, _state,
        pack=partial(_restamped, tensors=tensors, key=DESCRIPTION),
    )  # fmt: skip
    stats = stats_from(RNG.normal(size=(40, 8)))
    card = {"dataset": "d", "split": "train", "n": 40, "extractor": "e", "content_sha256": "0"}
    whole = reference_bytes(stats, card)
    yield Reader("reference", root / "c.safetensors", whole, _reference, sealed=True)
    upper = torch.from_numpy(stats.cov[np.triu_indices(8)].astype(np.float32))
    yield Reader(
        "reference: card", root / "d.safetensors", {**card, "format": 1}, _reference,
        pack=partial(
            _restamped, tensors={"mean": torch.from_numpy(stats.mean), "cov_upper": upper},
            key="card",
        ),
    )  # fmt: skip
    images = torch.from_numpy(RNG.integers(0, 256, (6, 3, 4, 4), np.uint8))
    yield Reader(
        "images in safetensors", root / "e.safetensors", save({"images": images}), statistics
    )
    checkpoint = root / "f.safetensors"
    state = {"a": {"b": [torch.arange(6.0), 3, "x"]}, "step": 7}
    save_checkpoint(checkpoint, state)
    yield Reader(
        "checkpoint", checkpoint, checkpoint.read_bytes(), load_checkpoint, sealed=True
    )
    path = root / "g.safetensors"
    yield Reader("inception", path, save({"x": torch.zeros(3)}), read_weights,
                 names=("Inception",))  # fmt: skip
