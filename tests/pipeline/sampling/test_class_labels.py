"""Class-conditional flows: labels in training data and stages, and samples of a class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.likelihood import log_prob
from flows.networks.condition import Condition
from flows.solving.solver import SolverConfig
from pipeline.config.sampling import GenerateConfig
from pipeline.distillation.distill import Distillation, distill, student_config
from pipeline.errors import UserError
from pipeline.runs.directory import read_manifest
from pipeline.runs.manifest import ClassesRecord
from pipeline.runs.run import load_blocks, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.class_labels import class_labels_of
from pipeline.storage.shards.opening import open_store
from pipeline.storage.shards.reader import StoreReader
from pipeline.training.stages import stage_folder
from pipeline.training.train import Outcome, train
from tests.flows.closed_form import jko_step
from tests.pipeline.gaussian_source import quiet, tiny
from tests.pipeline.killing import assert_same_content, kill_at
from tests.pipeline.labelled_source import CENTRES, SPREAD, LabelledSource

CLASSES = ("velocity.classes=2", "train.ema=0.9")
FM = (*CLASSES, "train.objective=fm", "velocity.kind=mlp", "velocity.width=32",
      "velocity.depth=1", "sampler.steps=8", "train.lr=0.02", "train.iterations=300",
      "train.warmup=10")  # fmt: skip
LFM = (*CLASSES, "train.objective=lfm", "lfm.gamma=[0.2]", "schedule.free_block=true")


def run(folder: Path, *overrides: str, known: bool = True, **request: int) -> Outcome:
    source = LabelledSource(known=known)
    return train(tiny(*overrides), folder, Accelerator(cpu=True), quiet, True, source, **request)


def stage(folder: Path, index: int) -> StoreReader:
    return open_store(stage_folder(folder, index), "stage")


# ---------------------------------------------------------------------------------- what is learnt


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "run"
    assert run(folder, *FM).complete
    return folder


def samples(folder: Path, label: int, guidance: float = 1.0, n: int = 500) -> Tensor:
    flow = open_run(folder).flow
    condition = Condition(torch.full((n,), label), guidance)
    return flow.sample(n, generator("samples"), SolverConfig("rk4", 8), condition=condition)


def nearest(z: Tensor) -> Tensor:
    return torch.cdist(z, CENTRES).argmin(dim=1)


@pytest.mark.parametrize("label", [0, 1])
def test_samples_are_of_their_class(learnt: Path, label: int) -> None:
    z = samples(learnt, label)
    assert (nearest(z) == label).float().mean() > 0.99
    torch.testing.assert_close(z.mean(dim=0), CENTRES[label], rtol=0, atol=0.15)
    assert z.std(dim=0).tolist() == pytest.approx([SPREAD] * 2, abs=0.15)
    assert (nearest(samples(learnt, label, guidance=1.5)) == label).float().mean() > 0.99


def test_samples_without_a_label_follow_all_data(learnt: Path) -> None:
    z = samples(learnt, 2)  # the null label
    assert (nearest(z) == 1).float().mean().item() == pytest.approx(0.75, abs=0.08)
    torch.testing.assert_close(samples(learnt, 0, guidance=0.0), z)


def test_likelihood_given_the_class(learnt: Path) -> None:
    z, labels = (stage(learnt, 0).field(name)[:200] for name in ("z", "labels"))
    flow = open_run(learnt).flow
    actual = log_prob(flow, z, condition=Condition(labels)).value
    normal = torch.distributions.Normal(CENTRES[labels], SPREAD).log_prob(z).sum(dim=1)
    assert (normal - actual).mean().abs() < 0.15
    wrong = log_prob(flow, z, condition=Condition(1 - labels)).value
    assert (wrong < actual - 5).float().mean() > 0.99


def test_class_counts_are_stored(learnt: Path) -> None:
    labels = LabelledSource().clusters
    assert read_manifest(learnt).classes == ClassesRecord(torch.bincount(labels).tolist())


def test_a_jko_step_of_every_class(tmp_path: Path) -> None:
    """A linear field with an offset for each class reaches the exact step of each cluster."""
    always = "velocity.class_dropout=0"
    run(tmp_path, "velocity.classes=2", always, "jko.h=[0.5]", "train.iterations=150")
    before, after = stage(tmp_path, 0), stage(tmp_path, 1)
    labels = before.field("labels")
    centred = torch.cat([before.field("z")[labels == k] for k in (0, 1)])
    centred = centred - torch.cat([CENTRES[k].expand(int((labels == k).sum()), 2) for k in (0, 1)])
    covariance = centred.double().T.cov()
    for label in (0, 1):
        own = before.field("z")[labels == label].double()
        exact = jko_step(own.mean(dim=0), covariance, 0.5)
        moved = after.field("z")[labels == label].double()
        torch.testing.assert_close(moved.mean(dim=0), exact.mean, rtol=0, atol=0.05)
        torch.testing.assert_close(moved.T.cov(), exact.covariance, rtol=0, atol=0.08)


def test_the_null_label_makes_the_jko_step_of_all_data(tmp_path: Path) -> None:
    """A linear field whose class is nearly always left out reaches the step of the mixture."""
    run(tmp_path, "velocity.classes=2", "velocity.class_dropout=0.99", "jko.h=[0.5]",
        "train.iterations=200")  # fmt: skip
    (block,) = load_blocks(tmp_path, read_manifest(tmp_path))
    z = stage(tmp_path, 0).field("z")
    null = Condition(torch.full((len(z),), 2))
    moved = block.transport(z, condition=null).z.double()
    exact = jko_step(z.double().mean(dim=0), z.double().T.cov(), 0.5)
    torch.testing.assert_close(moved.mean(dim=0), exact.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(moved.T.cov(), exact.covariance, rtol=0, atol=0.08)


# ------------------------------------------------------------------------ stages, resuming, runs


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two blocks of local flow matching for a few steps."""
    folder = tmp_path_factory.mktemp("quick") / "run"
    assert run(folder, *LFM, "train.iterations=10").blocks == 2
    return folder


def test_labels_travel_with_their_samples(quick: Path) -> None:
    labels = LabelledSource().clusters
    flow = load_blocks(quick, read_manifest(quick))
    for index, block in enumerate(flow):
        z = stage(quick, index).field("z")
        assert torch.equal(stage(quick, index).field("labels"), labels)
        for label in (0, 1):
            own = labels == label
            condition = Condition(torch.full((int(own.sum()),), label))
            solver = SolverConfig("rk4", 2)
            if index + 1 == len(flow):  # what the last block leaves is not kept
                continue
            moved = block.transport(z[own], solver=solver, condition=condition).z
            torch.testing.assert_close(stage(quick, index + 1).field("z")[own], moved)


OFTEN = (*LFM, "train.iterations=5", "train.checkpoint_seconds=0", "matching.coupling=ot",
         "train.batch_size=32", "velocity.class_dropout=0.3")  # fmt: skip


def _resume(folder: str) -> None:
    run(Path(folder), *OFTEN)


def test_killed_and_resumed_ends_in_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "whole", *OFTEN)
    killed = tmp_path / "killed"
    kill_at((9, 14), _resume, str(killed))
    run(killed, *OFTEN)
    assert_same_content(killed, tmp_path / "whole")


def test_blocks_start_from_a_conditional_run(quick: Path, tmp_path: Path) -> None:
    start = (*CLASSES, "jko.h=[0.1]", "train.iterations=1", "train.lr=1e-12")
    run(tmp_path / "jko", *start, f"train.init_from={quick}")
    before, after = (load_blocks(f, read_manifest(f))[0] for f in (quick, tmp_path / "jko"))
    for name, value in after.state_dict().items():
        torch.testing.assert_close(value, before.state_dict()[name], rtol=0, atol=1e-9)


def test_a_run_without_classes_starts_as_the_null_label(quick: Path, tmp_path: Path) -> None:
    start = ("jko.h=[0.1]", "train.iterations=1", "train.lr=1e-12")
    run(tmp_path / "plain", *start, f"train.init_from={quick}")
    z, t = torch.randn(20, 2, generator=generator("plain")), torch.tensor(0.3)
    before, after = (open_run(f).flow[0].velocity for f in (quick, tmp_path / "plain"))
    torch.testing.assert_close(after(t, z), before(t, z, torch.full((20,), 2)))


def test_other_classes_start_as_no_class(learnt: Path, tmp_path: Path) -> None:
    start = (*FM, "velocity.classes=3", "train.iterations=1", "train.lr=1e-12")
    run(tmp_path / "three", *start, f"train.init_from={learnt}")
    z = torch.randn(20, 2, generator=generator("adopted"))
    before, after = (open_run(f).flow[0].velocity for f in (learnt, tmp_path / "three"))
    t, unnamed = torch.tensor(0.3), before(torch.tensor(0.3), z, torch.full((20,), 2))
    for label in range(4):
        torch.testing.assert_close(after(t, z, torch.full((20,), label)), unnamed)
    assert not torch.allclose(before(t, z, torch.full((20,), 0)), unnamed, atol=1e-2)


def test_classes_start_from_a_run_without(tmp_path: Path) -> None:
    plain = (*FM, "velocity.classes=0", "train.iterations=50")
    run(tmp_path / "plain", *plain)
    start = (*FM, "train.iterations=1", "train.lr=1e-12")
    run(tmp_path / "classes", *start, f"train.init_from={tmp_path / 'plain'}")
    z, t = torch.randn(20, 2, generator=generator("told")), torch.tensor(0.3)
    before, after = (open_run(tmp_path / f).flow[0].velocity for f in ("plain", "classes"))
    for label in range(3):
        torch.testing.assert_close(after(t, z, torch.full((20,), label)), before(t, z))


@pytest.mark.parametrize(
    ("overrides", "known", "named"),
    [
        (CLASSES, False, "needs a class for every image, but the data set has no labels"),
        (("velocity.classes=1",), True, "has the label 1; set velocity.classes=2"),
    ],
)
def test_labels_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, overrides: tuple[str, ...], known: bool, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        run(tmp_path / "run", *overrides, known=known)
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_classes(quick: Path) -> None:
    with pytest.raises(UserError, match=r"started with velocity\.classes=2 \(now 3\)"):
        run(quick, *LFM, "velocity.classes=3", "train.iterations=10", add_blocks=1)


def test_a_distilled_run_keeps_its_classes(learnt: Path, tmp_path: Path) -> None:
    """One step of the student approximates the teacher's map of each class."""
    teacher = open_run(learnt)
    how = ("train.iterations=600", "train.lr=0.02", "train.ema=0.9")
    config = student_config(teacher, Distillation(1, 1, "midpoint"), how)
    place = Accelerator(cpu=True)
    out = distill(teacher, tmp_path, config, 1, place, quiet, source=LabelledSource())
    assert out == Outcome(1, True, 1)
    student = open_run(tmp_path)
    assert student.manifest.classes == teacher.manifest.classes
    noise = torch.randn(1000, 2, generator=generator("noise"))
    for label in (0, 1):
        of = Condition(torch.full((1000,), label))
        exact = teacher.flow.decode(noise, SolverConfig("dopri5"), condition=of)
        fast, coarse = (
            run.flow.decode(noise, SolverConfig("midpoint", 1), condition=of)
            for run in (student, teacher)
        )
        assert (fast - exact).square().mean() < (coarse - exact).square().mean() / 5
        assert (nearest(fast) == label).float().mean() > 0.99
    with pytest.raises(UserError, match="all distilled runs"):
        class_labels_of(student, GenerateConfig(guidance=2.0))
    teachers = "has its teacher's velocity.classes, 2, and"
    for setting, said in (
        ("velocity.classes=0", teachers),
        ("velocity.classes=3", teachers),
        ("velocity.class_dropout=0.1", teachers),
    ):
        with pytest.raises(UserError, match=said):
            student_config(teacher, Distillation(), (setting,))
