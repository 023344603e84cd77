"""Micro-batches have the gradient of the whole batch, and follow when memory runs out."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.networks.config import VelocityConfig
from flows.spec import BlockSpec, build_block
from pipeline.config.training import JkoConfig, MatchingConfig, TrainConfig
from pipeline.errors import JkoflowError
from pipeline.optim.micro_batches import is_out_of_memory
from pipeline.runtime.rng import generator
from pipeline.training.block_trainer import BlockTrainer
from tests.pipeline.double import InDouble
from tests.pipeline.gaussian_source import GaussianSource, tiny
from tests.pipeline.tiny import FORKSERVER

CASES = [
    ("jko", {"divergence": "exact"}),
    ("jko", {"divergence": "hutchinson"}),
    ("jko", {"divergence": "finite-difference"}),
    ("lfm", {}),
    ("lfm", {"coupling": "ot"}),
    ("fm", {"times": "logit-normal"}),
]


def trainer_of(
    folder: Path,
    objective: str,
    changes: dict[str, str],
    double: bool = True,
    count: int = 60,
    width: int = 8,
    **recipe: Any,
) -> BlockTrainer:
    stage = GaussianSource(count=count).first_stage(folder, tiny(), Accelerator())
    net = VelocityConfig("mlp", width=width, depth=1, zero_init=False)
    step = {"jko": {"h": 0.5}, "lfm": {"gamma": 0.3}, "fm": {}}[objective]
    spec = BlockSpec(net, objective="jko" if objective == "jko" else "lfm", **step)
    block = build_block(spec, (2,), generator(0, "weights", 0))
    if double:
        block.velocity = InDouble(block.velocity)
    options = (JkoConfig if objective == "jko" else MatchingConfig)(**changes)
    config = TrainConfig(**{"batch_size": 10, "ema": 0.0, **recipe})
    trainer = BlockTrainer(block, spec, stage, config, options, Accelerator())
    if double:
        samples = trainer.batches.samples
        trainer.batches.samples = lambda *part: samples(*part).double()  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize(("objective", "changes"), CASES)
@pytest.mark.parametrize("size", [3, 5])
def test_the_gradient_is_that_of_the_whole_batch(
    tmp_path: Path, objective: str, changes: dict[str, str], size: int
) -> None:
    whole = trainer_of(tmp_path, objective, changes)
    parts = trainer_of(tmp_path, objective, changes, micro_batch=size)
    expected = whole.objective.gradient(2)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(parts.objective.gradient(2), expected, rtol=1e-12, atol=1e-13)
    one, other = whole.step(), parts.step()
    assert one.nfe == other.nfe
    for name, value in one.terms.items():
        assert other.terms[name] == pytest.approx(value, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize(("objective", "changes"), CASES)
def test_a_part_of_the_size_of_the_batch_changes_no_byte(
    tmp_path: Path, objective: str, changes: dict[str, str]
) -> None:
    whole = trainer_of(tmp_path, objective, changes, double=False)
    same = trainer_of(tmp_path, objective, changes, double=False, micro_batch=10)
    for _ in range(2):
        assert whole.step() == same.step()
    for one, other in zip(whole.parameters, same.parameters, strict=True):
        assert torch.equal(one, other)


def limited(trainer: BlockTrainer, most: int) -> list[int]:
    """Let the memory of a trainer's device hold this many samples; return the sizes it took."""
    loss, sizes = trainer.objective.loss, []

    def checked(step: int, part: Tensor) -> Any:
        sizes.append(len(part))
        if len(part) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")
        return loss(step, part)

    trainer.objective.loss = checked  # type: ignore[method-assign]
    return sizes


def test_memory_that_runs_out_halves_the_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trainer_of(tmp_path, "jko", {}).objective.gradient(0)
    small = trainer_of(tmp_path, "jko", {})
    sizes = limited(small, 4)
    torch.testing.assert_close(small.objective.gradient(0), expected, rtol=1e-12, atol=1e-13)
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert "memory has run out; batches are taken in parts of 3 samples" in capsys.readouterr().err
    small.step()
    assert sizes[6:] == [3, 3, 3, 1]  # it keeps the size


#: a batch whose gradient needs about a gigabyte
LARGE: Any = {"double": False, "count": 8000, "width": 400, "batch_size": 8000}


def _gradient_in_little_memory(folder: Path) -> None:
    """Compute the gradient of a large batch in this process, with 300 MiB of further memory."""
    trainer = trainer_of(folder, "jko", {}, **LARGE)
    warm = trainer_of(folder / "warm", "jko", {}, double=False)
    warm.objective.gradient(0)  # starts the threads of autograd, which take room of their own
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
    gradient, size = trainer.objective.gradient(0), trainer.objective.micro_batches.size
    torch.save({"gradient": gradient, "size": size}, folder / "result.pt")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is that of Linux")
def test_a_process_with_little_memory_takes_parts(tmp_path: Path) -> None:
    process = FORKSERVER.Process(target=_gradient_in_little_memory, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    assert 1 <= result["size"] <= 4000
    given = trainer_of(tmp_path / "given", "jko", {}, micro_batch=result["size"], **LARGE)
    torch.testing.assert_close(result["gradient"], given.objective.gradient(0))


@pytest.mark.parametrize(
    ("given", "most", "size", "remedy"),
    [(4, 3, 4, "lower train.micro_batch, or take a smaller"), (None, 0, 1, "one; take a smaller")],
)
def test_parts_that_do_not_fit_are_an_error(
    tmp_path: Path, given: int | None, most: int, size: int, remedy: str
) -> None:
    trainer = trainer_of(tmp_path, "fm", {}, micro_batch=given)
    limited(trainer, most)
    with pytest.raises(JkoflowError, match=f"micro-batch of {size} samples .*{remedy}"):
        trainer.step()


def test_other_errors_are_no_lack_of_memory(tmp_path: Path) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    trainer = trainer_of(tmp_path, "fm", {})
    trainer.recipe = replace(trainer.recipe, batch_size=10)

    def broken(step: int, part: Tensor) -> Any:
        raise RuntimeError("shapes differ")

    trainer.objective.loss = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.step()
