"""What a run draws, under settings of one's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from pipeline.runs.run import Run
from pipeline.sampling.generate import sample_images
from tests.pipeline.gaussian_source import quiet


def images(run: Run, **changes: Any) -> Tensor:
    """Images of a run, uint8 (n, C, H, W), with changes of its section `generate`."""
    settings = dataclasses.replace(run.config.generate, **changes)
    return sample_images(run, settings, Accelerator(cpu=True), quiet).field("images")
