"""The learning-rate schedule against its closed form."""

from __future__ import annotations

import pytest

from pipeline.optim.learning_rate import warmup_cosine


def rates(steps: int, **settings: float) -> list[float]:
    return [warmup_cosine(n, steps, **settings) for n in range(steps)]  # type: ignore[arg-type]


def test_values_of_the_half_cosine() -> None:
    """At 0, 1/3, 1/2 and 2/3 of the training the cosine is 1, 1/2, 0 and -1/2."""
    actual = rates(6, peak=2.0, final=0.2, warmup=0)
    assert [actual[n] for n in (0, 2, 3, 4)] == pytest.approx([2.0, 1.6, 1.2, 0.8])


def test_the_last_rates_approach_the_final_fraction() -> None:
    assert rates(10_000, peak=3.0, final=0.1, warmup=5)[-1] == pytest.approx(0.3, rel=1e-6)


def test_the_warm_up_is_linear_from_the_first_step() -> None:
    assert rates(4, peak=1.0, final=1.0, warmup=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_warm_up_of_one_step_is_none(warmup: int) -> None:
    assert rates(3, peak=0.5, final=1.0, warmup=warmup) == [0.5, 0.5, 0.5]
