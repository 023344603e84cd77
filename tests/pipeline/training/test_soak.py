"""A long training: memory and descriptors stay flat.

JKOFLOW_SOAK_MINUTES=60 python -m pytest -m slow tests/pipeline/training/test_soak.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from accelerate import Accelerator

from pipeline.config.load import load_config
from pipeline.training.train import train
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.tiny import World


def _resident() -> int:
    """The resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_and_descriptors_stay_flat(trained: World, tmp_path: Path) -> None:
    """Trainings follow each other; after the first minute's share nothing may grow."""
    minutes = float(os.environ.get("JKOFLOW_SOAK_MINUTES", "1"))
    config = load_config(trained.config(train={"checkpoint_seconds": 0.0, "iterations": 30}))
    begun, samples, number = time.monotonic(), [], 0
    while time.monotonic() - begun < 60 * minutes or number < 6:
        train(config, tmp_path / f"run-{number}", Accelerator(), quiet, False)
        samples.append((_resident(), len(os.listdir("/proc/self/fd"))))
        number += 1
    settled = samples[len(samples) // 3 :]
    memory, descriptors = zip(*settled, strict=True)
    third = max(1, len(settled) // 3)
    growth = sum(memory[-third:]) / third - sum(memory[:third]) / third
    print(f"{number} trainings, {growth / 2**20:+.1f} MiB, {descriptors[0]}-{descriptors[-1]} fds")
    assert growth < 32 * 2**20
    assert descriptors[-1] <= descriptors[0] + 2
