"""Samples of a run, under changed settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from pipeline.runs.run import Run
from pipeline.sampling.generate import sample_images
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage.shards.reader import StoreReader
from tests.pipeline.gaussian_source import quiet


def plan_of(run: Run, **changes: Any) -> SamplingPlan:
    """Open the plan of a run, with changes of its sections `generate` and `sampler`."""
    solver = {key: changes.pop(key) for key in ("method", "steps") if key in changes}
    sampler = dataclasses.replace(run.config.sampler, **solver)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, sampler=sampler))
    return SamplingPlan.open(run, dataclasses.replace(run.config.generate, **changes))


def store_of(run: Run, **changes: Any) -> StoreReader:
    """Sample images of a run, with changes as in `plan_of`."""
    plan = plan_of(run, **changes)
    settings = plan.settings
    return sample_images(plan, settings.n, settings.seed, Accelerator(cpu=True), quiet)


def images(run: Run, **changes: Any) -> Tensor:
    """Sample images of a run, uint8 (n, C, H, W), with changes as in `plan_of`."""
    return store_of(run, **changes).field("images")
