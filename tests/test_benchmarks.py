"""Benchmarks can be imported, and their configurations are valid."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from pipeline.config.validate import check
from tests.benchmarks import bench_memory

FILES = sorted((Path(__file__).parent / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_benchmark_can_be_started(path: Path) -> None:
    assert callable(importlib.import_module(f"tests.benchmarks.{path.stem}").main)


def test_the_configuration_of_the_memory_benchmark_is_valid() -> None:
    check(bench_memory.settings())
