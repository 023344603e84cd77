"""Benchmarks can be imported, and their configurations are valid."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest
import torch

from pipeline.config.rules.validate import check
from tests import device
from tests.benchmarks import bench_memory, throughput

FILES = sorted((Path(__file__).parent / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_benchmark_can_be_started(path: Path) -> None:
    assert callable(importlib.import_module(f"tests.benchmarks.{path.stem}").main)


def test_the_configuration_of_the_memory_benchmark_is_valid() -> None:
    check(bench_memory.settings())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cpu", device.NAME, pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_the_throughput_of_a_device(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with device.lent(name):
        rows = throughput.main(["--device", name, "--tiny"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(name) and len(lines) == len(rows) + 2 == 10
    for row in rows:
        assert row.rate > 0 and row.memory > 0 and row.batch == 2
        assert math.isnan(row.reading) != row.name.startswith("train")


def test_a_rate_is_samples_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds of warming up and three measured ones of two seconds, until five are over."""
    clock = [0.0]

    def spend(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    work, read = (lambda: spend(2.0)), (lambda: spend(0.5))
    row = throughput.timed("row", 6, "fp32", torch.device("cpu"), 5.0, work, read)
    assert (row.rate, row.reading, clock[0]) == (3.0, 0.25, 5 * 2.0 + 3 * 0.5)
