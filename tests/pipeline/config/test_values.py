"""A setting may have one value per block."""

from __future__ import annotations

from pipeline.config.values import of_block


def test_a_value_of_a_block() -> None:
    assert [of_block(3, k) for k in range(2)] == [3, 3]
    assert [of_block([3, 2], k) for k in range(3)] == [3, 2, 2]
