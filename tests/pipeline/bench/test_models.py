"""Sizes and budgets of the models of a benchmark."""

import pytest
from accelerate import Accelerator

from pipeline.bench.budget import Budget
from pipeline.bench.models import blockwise_config, parameter_count, width_for
from pipeline.bench.problem import problem_config
from pipeline.bench.training import Training
from pipeline.config.plain import with_values
from pipeline.errors import UserError
from tests.pipeline.bench.test_bench import MODELS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suite", [("toy2d", "rose", 2, 35_000), ("tabular", "power", 6, 76_000)])
def test_models_have_at_most_the_parameters_that_are_wanted(name, suite) -> None:
    config = problem_config(suite[0], suite[1], (), 0)
    shape = (suite[2],)
    width = width_for(name, config, shape, suite[3])
    count = parameter_count(name, config, shape, width)
    assert 0.9 * suite[3] < count <= suite[3] < parameter_count(name, config, shape, width + 1)


def test_batches_are_split_over_blocks() -> None:
    config = problem_config("toy2d", "rose", (), 0)
    assert config.train.iterations == [2000, 1200, 1000, 1000]
    jko = blockwise_config(config, "jko", 8, 521)
    assert sum(jko.train.iterations) == 521 and jko.train.iterations[1:] == [120, 100, 100]
    assert jko.velocity.autonomous and jko.schedule.tolerance == 0
    assert config.train.warmup == 50 and jko.train.warmup == 10
    lfm = blockwise_config(config, "lfm", 8, 400)
    assert lfm.train.iterations == [100] * 4 and lfm.schedule.max_blocks == 3 and lfm.jko is None
    fm = blockwise_config(config, "fm", 8, 400)
    assert fm.train.iterations == [400] and not fm.velocity.autonomous
    assert fm.train.warmup == 40 and blockwise_config(config, "fm", 8, 900).train.warmup == 50
    segments = blockwise_config(config, "segments", 8, 400)
    assert segments.train.iterations == [400] and segments.train.objective == "fm"
    assert segments.velocity.nets == 4 and fm.velocity.nets == 1
    with pytest.raises(UserError, match="3 batches for 4 blocks"):
        blockwise_config(config, "jko", 8, 3)
    again = with_values(config, {"jko.reparameterize": 2, "jko.later_iterations": 7})
    three = blockwise_config(again, "jko", 8, 1563)
    assert three.train.iterations == jko.train.iterations and three.jko.later_iterations is None
    assert blockwise_config(again, "fm", 8, 400).train.iterations == [400]
    with pytest.raises(UserError, match="11 batches for 4 blocks of jko in 3 passes"):
        blockwise_config(again, "jko", 8, 11)
    with pytest.raises(UserError, match="jko.refine is 2; expected 1"):
        blockwise_config(with_values(config, {"jko.refine": 2}), "jko", 8, 400)


@pytest.mark.parametrize("shares", [[100, 100, 100, 20000], [1, 1000], [1, 1, 1000], [9, 9, 1]])
def test_every_block_has_a_batch_however_small_its_share(shares) -> None:
    config = problem_config("toy2d", "rose", [f"train.iterations={shares}"], 0)
    for batches in (4, 5, 6, 32, 1000):
        iterations = blockwise_config(config, "jko", 8, batches).train.iterations
        assert min(iterations) >= 1 and sum(iterations) == batches


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, [8, 300]), (0.5, [8])])
def test_seconds_of_a_batch_come_from_enough_batches(monkeypatch, seconds, calls) -> None:
    training = Training(Budget(100, "seconds"), 600, Accelerator(), lambda items, **_: items)
    probed = []

    def probe(_self, _name, _width, batches, _problem):
        probed.append(batches)
        return seconds * batches, batches

    monkeypatch.setattr(Training, "_probe", probe)
    assert training._pace("fm", 8, 1, None) == pytest.approx(seconds) and probed == calls
