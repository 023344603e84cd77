"""What the tests of the trainer share."""

from __future__ import annotations

import pytest
from accelerate import Accelerator


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator()
