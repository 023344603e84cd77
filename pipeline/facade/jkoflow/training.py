"""Training on a caller's own tensors or data set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jkoflow.mistakes import user_errors
from jkoflow.model import Model, load
from pipeline.cli.session import make_accelerator
from pipeline.config.data import LATENTS
from pipeline.config.load import load_config
from pipeline.data.encoding import encode
from pipeline.data.one_writer import one_writer
from pipeline.data.tensors import check_own_labels, write_images, write_latents
from pipeline.errors import UserError
from pipeline.runtime.console import progress_bar
from pipeline.training.train import train


@user_errors
def fit(
    data: Tensor | Dataset[Any] | None = None,
    labels: Tensor | None = None,
    config: str = "mnist-fm",
    out: str | Path | None = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the option's name
) -> Model:
    """Train a model; the run directory `out` resumes, and every command accepts it.

    A second call with the same arguments continues a training that was interrupted, and loads one
    that is finished. Floats are latents (n, C, H, W) or (n, D). Bytes are images (n, C, H, W).

    Args:
        data: float latents; uint8 images; a `torch.utils.data.Dataset` whose items are one of
            these or a PIL image, alone or with a label; or None for the configuration's own data.
        labels: class of each sample, (n,); by default those of the Dataset, if it has any.
        config: a packaged configuration or a .yaml.
        out: the run directory; the default is runs/NAME.
        set: overrides by dotted key, such as {"train.iterations": 1000}.

    Returns:
        the trained model. Latents whose shape is that of the configuration's autoencoder are
        decoded to images by it; others stay tensors.

    Raises:
        UserError: the data, the labels or a setting do not fit.
    """
    given = dict(set or {})
    if data is not None:
        data, labels = _tensors(data, labels)
        given = {**_data_settings(data, labels), **given}
    elif labels is not None:
        raise UserError("labels are given without data; expected both; give the data")
    settings = load_config(config, overrides(given))
    folder = Path(out) if out is not None else Path("runs") / settings.name
    accelerator = make_accelerator(shards=True)
    if settings.data.name != LATENTS:
        encode(settings, accelerator, progress_bar)
    with one_writer(folder, "the run at", accelerator):
        begun = (folder / "config.yaml").is_file()
        train(settings, folder, accelerator, progress_bar, resume=begun)
    return load(folder)


def overrides(values: Mapping[str, Any] | None) -> list[str]:
    """Return values by dotted key as `--set` takes them; they may be paths and numpy's numbers.

    Raises:
        UserError: a value is of another type than settings have.
    """
    return [f"{key}={json.dumps(value, default=_plain)}" for key, value in (values or {}).items()]


def _plain(value: object) -> object:
    """Return a path as text, and a number of numpy as one of Python."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    raise UserError(
        f"a setting is {value!r}; expected a number, a text, a path, a list or None; convert it"
    )


def _data_settings(data: Tensor, labels: Tensor | None) -> dict[str, Any]:
    """Store samples (n, …) with labels (n,), and return the settings that name them."""
    check_own_labels(labels, len(data))
    classes = 0 if labels is None else int(labels.max()) + 1
    images = data.dtype == torch.uint8
    path = (write_images if images else write_latents)(data, labels)
    chosen: dict[str, Any] = {
        "data.name": "npz" if images else LATENTS,
        "data.path": str(path),
        "data.also": [],
        "data.limit": None,
        "velocity.classes": classes,
        "generate.guide": None,
        "generate.refiner": None,
    }
    if not classes:
        chosen["generate.guidance"] = None
    if not images:  # there are no images to compare with
        chosen |= {"evaluate.floor": False, "evaluate.nll": 0, "latents.mirror": False}
    return chosen


def _tensors(data: Tensor | Dataset[Any], labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the samples (n, …) of data, and their labels (n,) or None."""
    if isinstance(data, Tensor):
        return data, None if labels is None else torch.as_tensor(labels)
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise UserError(
            f"the data are {type(data).__name__}; expected a tensor or a torch Dataset with a "
            "length"
        )
    samples, found = [], []
    for index in range(len(data)):
        item = data[index]
        if isinstance(item, (tuple, list)):
            item, label = item[0], item[1] if len(item) > 1 else None
            if label is not None:
                found.append(int(label))
        samples.append(_tensor(item))
    if not samples:
        raise UserError("the Dataset is empty; expected at least one item")
    if len({(x.shape, x.dtype) for x in samples}) > 1:
        raise UserError("the items of the Dataset differ in shape or type; expected one of each")
    if labels is None and found:
        labels = torch.tensor(found)
    return torch.stack(samples), None if labels is None else torch.as_tensor(labels)


def _tensor(item: Any) -> Tensor:  # noqa: ANN401 - an item of any Dataset
    """Return a tensor, an array or a PIL image as a tensor; images are (C, H, W)."""
    if isinstance(item, Tensor):
        return item
    array = np.array(item)
    if array.dtype == object:
        raise UserError(
            f"an item of the Dataset is {type(item).__name__}; expected a tensor or a PIL image"
        )
    tensor = torch.from_numpy(array)
    if isinstance(item, np.ndarray):
        return tensor
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()
