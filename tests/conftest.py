"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.assets.fetch import fetch_asset
from tests.device import register

register()  # before the first backward pass, at which autograd counts the devices


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed PyTorch before the fixtures of a test, so that every run draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def inception_weights() -> Path:
    """The FID network's real weights; what needs them fails where they cannot be had."""
    return fetch_asset("inception")
