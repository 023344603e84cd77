"""Number of samples that a finished block is measured on, and the measurements."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from flows.networks.config import VelocityConfig
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.runtime.rng import generator
from pipeline.training.block_trainer import BlockTrainer
from pipeline.training.diagnostics import Diagnostics, measure
from tests.pipeline.gaussian_source import GaussianSource, tiny

SAMPLER = SolverConfig("rk4", steps=4)  # 16 evaluations


def measured(folder: Path, count: int, **changes: Any) -> tuple[Diagnostics, int, list[str]]:
    """Measure a new block, v = 0; return diagnostics, number of samples, progress labels."""
    network = VelocityConfig("mlp", width=8, depth=1, nets=changes.pop("nets", 1))
    spec = BlockSpec(network, SAMPLER, **changes)
    stage = GaussianSource(count=count).first_stage(folder, tiny(), Accelerator())
    block = build_block(spec, (2,), generator(0, "weights", 0))
    options = JkoConfig() if spec.objective == "jko" else MatchingConfig()
    recipe = TrainConfig(batch_size=100)
    trainer = BlockTrainer(block, spec, stage, recipe, options, Accelerator())
    seen, labels = [0], []

    def bar(batches: Iterable[torch.Tensor], total: int, label: str) -> Iterable[torch.Tensor]:
        labels.append(label)
        for rows in batches:
            seen[0] += len(rows)
            yield rows

    return measure(trainer, SAMPLER, bar), seen[0], labels


REGRESSION = {"objective": "lfm", "gamma": 0.1}


@pytest.mark.parametrize(
    ("reads", "changes", "expected"),
    [
        (2**35, REGRESSION, 4096),
        (16 * 1000, REGRESSION, 1000),  # by the evaluation and the parameter; see below
        (16 * 1000, REGRESSION | {"nets": 2}, 1000),  # one of them is evaluated at a time
        (1, REGRESSION, 256),
        (1, {"objective": "jko", "h": 0.5}, 4096),
    ],
)
def test_a_large_network_is_measured_on_fewer_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int, changes: dict[str, Any],
    expected: int,
) -> None:  # fmt: skip
    network = build_block(BlockSpec(VelocityConfig("mlp", width=8, depth=1), SAMPLER), (2,))
    size = sum(p.numel() for p in network.parameters())
    monkeypatch.setattr("pipeline.training.diagnostics._MOST_READS", reads * size)
    actual, seen, labels = measured(tmp_path, 5000, **changes)
    assert seen == expected
    assert labels == ["measure block 0"]
    assert actual.moved["movement"] == 0
    norm = actual.moved["squared_norm"]
    assert norm == pytest.approx(3.5, rel=6 * (2 * (3**2 + 0.5**2)) ** 0.5 / 3.5 / expected**0.5)
    assert actual.terms["potential"] == pytest.approx(norm / 2)
    assert actual.terms["total"] == pytest.approx(norm / 2)
    assert actual.terms["neg_log_det"] == 0


def test_of_few_samples_all_are_measured(tmp_path: Path) -> None:
    _, seen, _ = measured(tmp_path, 40, **REGRESSION)
    assert seen == 40
