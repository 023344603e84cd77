"""Readers of configurations and of locks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from autoencoders.conversion.official import architecture_of
from autoencoders.conversion.official import read_yaml as read_model_yaml
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import load, load_config
from pipeline.storage.lock import _read as read_lock
from tests.faults.mutations import as_json, as_yaml
from tests.faults.readers.reader import Reader
from tests.pipeline.tiny import World


def document_readers(root: Path, world: World) -> Iterator[Reader]:
    plain = yaml.safe_load(Path(world.config()).read_text())
    yield Reader(
        "configuration", root / "c.yaml", plain, lambda path: repr(load_config(str(path))),
        pack=as_yaml, names=tuple(plain),
    )  # fmt: skip
    yield Reader(
        "configuration as text", root / "d.yaml", as_yaml(plain),
        lambda path: repr(load_config(str(path))), names=tuple(plain),
    )  # fmt: skip
    recipe = {
        "data": plain["data"], "architecture": {"width_factors": [1, 2], "levels": [0, 255]},
        "training": {"iterations": 5, "batch_size": 4},
    }  # fmt: skip
    yield Reader(
        "autoencoder configuration", root / "e.yaml", recipe,
        lambda path: repr(_recipe(path)), pack=as_yaml, names=("ch_mult", "encoder", *recipe),
    )  # fmt: skip
    model = {"model": {"target": "taming.models.vqgan.VQModel", "params": {
        "embed_dim": 4, "n_embed": 8, "ddconfig": {
            "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3,
            "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [],
            "dropout": 0.0,
        }}}}  # fmt: skip
    yield Reader(
        "model.yaml", root / "m.yaml", model,
        lambda path: repr(architecture_of(read_model_yaml(path))), pack=as_yaml,
        names=("ddconfig", "params", "architecture", "ch_mult", "image_shape", "yaml", "n_embed"),
    )  # fmt: skip
    lock = {"host": "x", "pid": 1, "start": "1", "since": 1.0}
    yield Reader("lock", root / ".run.lock", lock, lambda path: repr(read_lock(path)),
                 pack=as_json)  # fmt: skip


def _recipe(path: Path) -> object:
    config = load(AutoencoderConfig, str(path), [], "autoencoders")
    return config.architecture.build((1, 12, 12))
