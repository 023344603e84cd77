"""Measurements: `evaluate` of a run, and `fid` of two sets of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jkoflow.mistakes import user_errors
from jkoflow.model import Model, load
from jkoflow.training import overrides
from pipeline.cli.session import make_accelerator, replace_given
from pipeline.config.load import overridden
from pipeline.errors import UserError
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.fid import fid_between
from pipeline.runtime.console import progress_bar
from pipeline.storage import atomic

#: sections that `set` may change; `jkoflow.load` decides how images are sampled
_SECTIONS = ("evaluate", "data.path")


@user_errors
def evaluate(
    model: Model | str | Path,
    n: int | None = None,
    *,
    reference: str | None = None,
    seed: int | None = None,
    set: dict[str, Any] | None = None,  # noqa: A002 - the option's name
) -> dict[str, Any]:
    """Measure a run as `jkoflow evaluate` does; writes its metrics.json and returns the content.

    Args:
        model: a model, a run directory or zoo:NAME; `jkoflow.load` sets solver and guidance.
        n: sampled images.
        reference: a shipped name, a folder, an .npz or a file of statistics.
        seed: of the noise.
        set: overrides of the section evaluate and of data.path, such as {"evaluate.nll": 0}.

    Raises:
        UserError: n is below 2, a data set has fewer images than are needed, or `set` has another
            key.
    """
    if not isinstance(model, Model):
        model = load(model)
    plan = model.plan
    config = overridden(plan.run.config, overrides(set), _SECTIONS)
    run = dataclasses.replace(plan.run, config=config)
    settings = replace_given(config.evaluate, n=n, reference=reference)
    sampling = plan.settings if seed is None else dataclasses.replace(plan.settings, seed=seed)
    plan = dataclasses.replace(plan, run=run, settings=sampling)
    try:
        return Evaluator(make_accelerator(), progress_bar).evaluate(plan, settings)
    finally:  # the networks, which the plan shares, were moved to the accelerator
        model.plan.flow.to(model.device)


@user_errors
def fid(a: str | Path | Tensor, b: str | Path | Tensor) -> float:
    """Compute the FID of two sets of images, as `jkoflow fid` does.

    A set is images uint8 (n, C, H, W), a folder, an .npz, or a reference such as mnist-train.

    Raises:
        UserError: a tensor is not uint8 (n, C, H, W) with n ≥ 2, a path does not exist, or a set
            is damaged or too small.
    """
    accelerator = make_accelerator()
    with atomic.scratch_folder() as folder:
        first, second = _as_file(a, folder / "a.npz"), _as_file(b, folder / "b.npz")
        return fid_between(first, second, accelerator, _silent)


def _silent(name: str) -> Callable[[int], None]:
    """Return a function that ignores the progress of the named set."""
    return lambda count: None


def _as_file(images: str | Path | Tensor, path: Path) -> str:
    """Return the name of a set; a tensor (n, C, H, W) is written to a file."""
    if not isinstance(images, Tensor):
        return str(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
        raise UserError(
            f"the images are {images.dtype} {tuple(images.shape)}; expected uint8 (n, C, H, W) "
            "with n ≥ 2"
        )
    np.savez(path, arr_0=images.cpu().permute(0, 2, 3, 1).contiguous().numpy())
    return str(path)
