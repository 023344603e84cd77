"""`import jkoflow`: the same images as the command line, inversion, editing and training."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jkoflow
from autoencoders.base import to_float
from flows.errors import FlowError
from flows.networks.condition import Condition
from flows.networks.config import VelocityConfig
from flows.partial import part_of
from flows.solving.solver import SolverConfig
from flows.spec import BlockSpec
from jkoflow import measuring
from jkoflow.training import overrides
from pipeline.runs.zoo import zoo
from pipeline.sampling import class_labels
from pipeline.sampling.inversion import round_trip
from tests.flows.problems import fresh_flow
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import SIDE, World, make_world, pictures, say

#: a flow-matching training of a second
_SMALL = {"train.objective": "fm", "train.iterations": 40, "train.lr": 0.02}


def own_images(n: int = 40) -> Tensor:
    return torch.from_numpy(pictures(n, seed=1))[:, None]


@pytest.fixture(scope="module")
def classes_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with a class-conditional run at `run`, trained from a tensor of images."""
    world = make_world(tmp_path_factory.mktemp("facade"))
    patch = pytest.MonkeyPatch()
    patch.setenv("JKOFLOW_HOME", str(world.home))
    config = world.config(data={"name": "mnist", "path": None, "size": None, "mode": "RGB"},
                          train={"objective": "fm"})  # fmt: skip
    data = [(image, index % 3) for index, image in enumerate(own_images())]
    jkoflow.fit(data, config=config, out=world.root / "run", set=_SMALL)  # type: ignore[arg-type]
    patch.undo()
    return world


@pytest.fixture
def model(classes_world: World, monkeypatch: pytest.MonkeyPatch) -> jkoflow.Model:
    monkeypatch.setenv("JKOFLOW_HOME", str(classes_world.home))
    return jkoflow.load(classes_world.root / "run")


def generated(run: str | Path, path: Path, capsys: Any, *words: str) -> Tensor:
    """The images of `jkoflow generate`, uint8 (n, C, H, W)."""
    out = ("--npz", path / "images.npz", "--out", path / "grid.png")
    assert say(capsys, "generate", "--run", run, *out, *words)[0] == 0
    return torch.from_numpy(np.load(path / "images.npz")["arr_0"]).permute(0, 3, 1, 2)


def test_the_import_is_lazy() -> None:
    code = "import jkoflow, sys; assert not {'torch', 'numpy', 'pipeline'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=path_environment())


def path_environment() -> dict[str, str]:
    """The environment of a process that finds this clone."""
    root = Path(__file__).parents[3]
    return {"PYTHONPATH": f"{root}:{root / 'pipeline/facade'}"}


def test_a_hidden_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval.py").write_text("")
    found = subprocess.run(
        [sys.executable, "-c", "import jkoflow; jkoflow.load"],
        cwd=tmp_path, env=path_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert "ImportError: the module eval at" in found.stderr


@pytest.mark.parametrize("words", [(), ("--class", "1", "--guidance", "1.5", "--seed", "3")])
def test_sample_equals_generate(
    model: jkoflow.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple
) -> None:
    expected = generated(model.run.folder, tmp_path, capsys, "-n", "6", *words)
    given = {"classes": 1, "guidance": 1.5, "seed": 3} if words else {}
    assert torch.equal(model.sample(6, **given), expected)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "mnist" else pytest.mark.slow) for n in zoo()]
)
def test_shipped_runs_sample_as_generate(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guides and refiners are included; three of the images differ without them."""
    expected = generated(f"zoo:{name}", tmp_path, capsys, "-n", "4")
    assert torch.equal(jkoflow.load(f"zoo:{name}").sample(4), expected)


def test_inversion_returns(model: jkoflow.Model) -> None:
    x = own_images(5)
    inverted = model.invert(x, classes=[0, 1, 2])
    assert float(inverted.error.max()) < 1e-3
    by_hand = (inverted.latents - inverted.returned).flatten(1).square().mean(1)
    assert torch.allclose(inverted.error, by_hand)
    again = model.sample(noise=inverted.noise, classes=[0, 1, 2])
    decoded = model.decode(model.encode(x))
    assert (again.int() - decoded.int()).abs().max() <= 3
    assert torch.equal(model.encode(x), model.encode(to_float(x)))


def test_an_edit_to_the_own_class_changes_nothing(model: jkoflow.Model) -> None:
    x = own_images(4)
    decoded = model.decode(model.encode(x))
    same = model.edit(x, to=1, strength=0.5, classes=1)
    assert (same.int() - decoded.int()).abs().max() <= 3
    weak, strong = (
        (model.edit(x, to=2, strength=s, classes=1).int() - decoded.int()).abs().float().mean()
        for s in (0.25, 1.0)
    )
    assert 0 < weak < strong


def test_parts_compose_to_the_flow(model: jkoflow.Model) -> None:
    plan, z = model.plan, torch.randn((3, *model.latent_shape))
    flow = model._flow
    states = list(flow.path(z, [0.0, 0.25, 1.0], torch.tensor([0, 1, 2])))
    whole = plan.flow.encode(
        z, list(plan.solvers), condition=flow.condition(torch.tensor([0, 1, 2]), 0, 3)
    )
    assert torch.allclose(states[-1], whole, atol=0.02) and not torch.equal(states[1], whole)
    with pytest.raises(FlowError, match=r"the part \[0.5, 2\] of a flow is invalid"):
        part_of(plan.flow, plan.solvers, 0.5, 2.0)


def test_interpolation_follows_the_sphere() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    points = jkoflow.interpolate(a, b, 3)
    expected = torch.tensor([[[3.0, 0.0]], [[4.5**0.5, 4.5**0.5]], [[0.0, 3.0]]])
    assert torch.allclose(points, expected, atol=1e-6)
    assert torch.allclose(jkoflow.interpolate(a, 2 * a, 3)[1], 1.5 * a)


def test_log_prob_equals_the_command(
    model: jkoflow.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    x = own_images(6)
    for index, picture in enumerate(x):
        (tmp_path / "pictures" / str(index % 3)).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "pictures" / str(index % 3) / f"{index}.png"
        Image.fromarray(picture[0].numpy()).save(path)
    order = [0, 3, 1, 4, 2, 5]  # by folder
    result = model.log_prob(x[order], classes=[0, 0, 1, 1, 2, 2])
    command = ("likelihood", "--run", model.run.folder, "--folder", tmp_path / "pictures")
    assert say(capsys, *command, "-n", "6")[0] == 0
    rows = json.loads((model.run.folder / "likelihood.json").read_text())["ranking"]
    ranked = {row["index"]: row["log_prob"] for row in rows}
    assert result.value.tolist() == [ranked[i] for i in range(6)]


def test_a_training_on_tensors_resumes(
    classes_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that stops between blocks ends in the bytes of an unbroken one."""
    monkeypatch.setenv("JKOFLOW_HOME", str(classes_world.home))
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    config = classes_world.config("tensors", data={"name": "mnist", "path": None, "size": None,
                                                   "mode": "RGB"})  # fmt: skip
    whole = jkoflow.fit(z, config=config, out=tmp_path / "whole")
    begun = {"train.max_minutes": 1e-6}
    with pytest.raises(jkoflow.UserError, match="stopped after|no finished block"):
        jkoflow.fit(z, config=config, out=tmp_path / "parts", set=begun)
    resumed = jkoflow.fit(z, config=config, out=tmp_path / "parts")
    blocks = [sorted(m.run.folder.glob("blocks/*.safetensors")) for m in (whole, resumed)]
    assert [p.read_bytes() for p in blocks[0]] == [p.read_bytes() for p in blocks[1]]
    assert torch.equal(whole.sample(3), resumed.sample(3))
    assert whole.sample(3).shape == (3, 5) and whole.log_prob(z[:2]).value.shape == (2,)


def test_commands_accept_a_run_on_tensors(
    classes_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: jkoflow.Model
) -> None:
    """Latents that the autoencoder decodes give images; others are not called points."""
    config = classes_world.config("latents", data={"name": "mnist", "path": None, "size": None,
                                                   "mode": "RGB"})  # fmt: skip
    z = torch.randn(40, 2, 3, 3)
    short = {"train.iterations": 2, "schedule.max_blocks": 1}
    jkoflow.fit(z, torch.arange(40) % 2, config, tmp_path / "z", short)
    assert generated(tmp_path / "z", tmp_path, capsys, "-n", "3").shape == (3, 1, SIDE, SIDE)
    for words in (("verify",), ("report", "--run"), ("train", "--resume", "--run")):
        assert say(capsys, *words, tmp_path / "z")[0] == 0
    jkoflow.fit(z[:, :1], None, config, tmp_path / "other", short)
    code, _, last = say(capsys, "generate", "--run", tmp_path / "other")
    assert code == 2 and "is on tensors of shape 1x3x3" in last


def test_the_density_of_tensors_needs_their_classes(
    classes_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(classes_world.home))
    config = classes_world.config("vectors", data={"name": "mnist", "path": None, "size": None,
                                                   "mode": "RGB"})  # fmt: skip
    z, short = torch.randn(40, 5), {"train.iterations": 2, "schedule.max_blocks": 1}
    model = jkoflow.fit(z, torch.arange(40) % 2, config, tmp_path / "run", short)
    with pytest.raises(jkoflow.UserError, match="expected that of every sample; give classes"):
        model.log_prob(z[:2])
    assert model.log_prob(z[:2], classes=[0, 1]).value.shape == (2,)
    with pytest.raises(jkoflow.UserError, match="has no autoencoder, because it is on points or"):
        jkoflow.evaluate(model)


def test_own_images_are_evaluated(
    model: jkoflow.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An .npz has one split, which is also that of the floor and the likelihood."""
    stand_in(monkeypatch)
    np.savez(model.run.folder / "real.npz", arr_0=own_images(30).permute(0, 2, 3, 1).numpy())
    metrics = jkoflow.evaluate(model, 12, reference=str(model.run.folder / "real.npz"))
    assert metrics["fid"]["n"] == 12 and metrics["rfid"]["split"] == "train"
    assert metrics["nll"]


def test_fid_of_tensors_is_that_of_files(tmp_path: Path, inception_weights: Path) -> None:
    a, b = own_images(4), 255 - own_images(4)
    np.savez(tmp_path / "b.npz", arr_0=b.permute(0, 2, 3, 1).numpy())
    assert jkoflow.fid(a, b) == jkoflow.fid(a, tmp_path / "b.npz") > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(own_images(2)[0]), r"the shape of the images is \(1, 12, 12\)"),
        (lambda m: m.encode(own_images(2) * torch.nan), "values of the images are not finite"),
        (lambda m: m.encode(own_images(2).float()), r"expected uint8, or float in \[-1, 1\]"),
        (lambda m: m.encode(own_images(2).long()), "the images are torch.int64"),
        (lambda m: m.decode(torch.zeros(2, 9)), r"the shape of the latents is \(2, 9\)"),
        (lambda m: m.sample(0), "n is 0; expected at least 1"),
        (lambda m: m.sample(classes="cat"), r"'cat'; expected the name .* of a class \(0, 1, 2\)"),
        (lambda m: m.sample(classes=[]), "classes is empty"),
        (lambda m: m.sample(classes=1.0), "classes is 1.0; expected names or whole numbers"),
        (lambda m: m.sample(classes=[1.5]), r"classes is \[1.5\]; expected names or whole"),
        (lambda m: jkoflow.evaluate(m, set={"evaluate.n": {1}}), r"a setting is \{1\}; expected"),
        (lambda m: m.sample(2, noise=torch.zeros(2, 2, 3, 3)), "n and noise are both given"),
        (lambda m: m.edit(own_images(2), to=7), "must lie between 0 and 2"),
        (lambda m: m.edit(own_images(2), to=1, strength=0), "strength is 0"),
        (lambda m: m.edit(own_images(2), to=None), "the class `to` is None"),
        (lambda m: m.sample(noise=torch.zeros(2, 2, 3, 3).long()), "noise is torch.int64"),
        (lambda m: m.sample(2, guidance=torch.nan), "guidance must be finite"),
        (lambda m: m.log_prob(own_images(2), 1, "sure"), "unknown divergence 'sure'"),
        (lambda m: m.to("abacus"), "--device is abacus"),
        (lambda m: jkoflow.load("zoo:mnist", device="abacus"), "--device is abacus"),
        (lambda m: jkoflow.load("hf://nobody"), "expected hf://owner/name"),
        (lambda m: jkoflow.fid("a", "b"), "neither a path nor a shipped reference"),
        (lambda m: m.log_prob(own_images(2)), "needs a class from 0 to 2"),
        (lambda m: jkoflow.load("zoo:mnist").edit(torch.zeros(1, 1, 28, 28), to="dog"),
         "was trained without classes"),
        (lambda m: jkoflow.interpolate(torch.zeros(2), torch.zeros(3), 4), "have the shapes"),
        (lambda m: jkoflow.interpolate(torch.zeros(2), torch.zeros(2), 1), "expected at least 2"),
        (lambda m: jkoflow.fid(torch.zeros(3, 1, 4, 4), "b"), "expected uint8"),
        (lambda m: jkoflow.fit(torch.zeros(4, 2) / 0), "not finite"),
        (lambda m: jkoflow.fit(torch.zeros(4, 2, 2)), r"float \(n, C, H, W\)"),
        (lambda m: jkoflow.fit(torch.zeros(4, 2), torch.zeros(4)), "the labels are torch.float32"),
        (lambda m: jkoflow.fit(labels=torch.zeros(4)), "labels are given without data"),
        (lambda m: jkoflow.fit([torch.zeros(2), torch.zeros(3)]), "differ in shape or type"),
        (lambda m: jkoflow.fit([]), "the Dataset is empty"),
        (lambda m: jkoflow.evaluate(m, set={"sampler.steps": 1}), "expected a key of evaluate, d"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    model: jkoflow.Model, call: Callable[[jkoflow.Model], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert isinstance(caught.value, jkoflow.UserError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("classes", [np.array([2, 0]), torch.tensor([2, 0]), [np.int64(2), 0]])
def test_numbers_of_classes_are_no_names(
    model: jkoflow.Model, monkeypatch: pytest.MonkeyPatch, classes: Any
) -> None:
    """Folders named 1, 10 and 2 have the numbers 0, 1 and 2; a text is a name first."""
    monkeypatch.setattr(class_labels, "class_names_of", lambda _: ["1", "10", "2"])
    assert torch.equal(model.sample(4, classes=classes), model.sample(4, classes=["2", "1"]))
    assert not torch.equal(model.sample(4, classes=classes), model.sample(4, classes=["10", "0"]))


def test_settings_may_be_paths_and_numbers_of_numpy() -> None:
    values = {"data.path": Path("/x"), "evaluate.n": np.int64(3), "train.lr": np.float32(0.5)}
    assert overrides(values) == ['data.path="/x"', "evaluate.n=3", "train.lr=0.5"]


def test_an_evaluation_leaves_the_networks_on_their_device(
    model: jkoflow.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluator moves them to the accelerator, which can be another device."""

    class Mover:
        def __init__(self, *_: Any) -> None:
            """Take what an evaluator takes."""

        def evaluate(self, plan: Any, _: Any) -> dict[str, Any]:
            plan.flow.to("meta")
            raise RuntimeError("stopped")

    moved: list[str] = []
    flow = type(model.plan.flow)
    monkeypatch.setattr(flow, "to", lambda self, device: moved.append(str(device)) or self)
    monkeypatch.setattr(measuring, "Evaluator", Mover)
    with pytest.raises(RuntimeError, match="stopped"):
        jkoflow.evaluate(model)
    assert moved == ["meta", "cpu"]


def test_a_part_of_a_block_has_its_share_of_steps_rounded_up(model: jkoflow.Model) -> None:
    flow = model.plan.flow[:1]
    for stop, steps in ((0.3, 2), (0.5, 2), (0.6, 3), (0.75, 3), (1.0, 4)):
        _, solvers = part_of(flow, [SolverConfig("rk4", steps=4)], 0.0, stop)
        assert solvers[0].steps == steps


def test_a_fixed_point_step_brings_the_inversion_closer() -> None:
    spec = BlockSpec(VelocityConfig(kind="mlp", width=8, depth=1, zero_init=False))
    flow, solver = fresh_flow((3,), [spec], 1), SolverConfig("euler", 8)
    z = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    plain = flow.decode(flow.encode(z, solver), solver)
    noise, returned = round_trip(flow, [solver], z, None)
    before, after = ((z - back).square().mean(1) for back in (plain, returned))
    assert (after <= before).all() and after.mean() < before.mean() / 4
    torch.testing.assert_close(flow.decode(noise, solver), returned)


def test_an_adaptive_solver_inverts_with_its_own_tolerance(model: jkoflow.Model) -> None:
    plan = dataclasses.replace(model.plan, solvers=(SolverConfig("dopri5"),))
    z, labels = torch.randn((3, *model.latent_shape)), torch.tensor([0, 1, 2])
    inverted = dataclasses.replace(model._flow, plan=plan).invert(z, labels)
    fine = SolverConfig("dopri5", rtol=1e-6, atol=1e-6)
    expected = plan.flow.encode(z, fine, condition=Condition(labels))
    assert torch.equal(inverted.noise, expected)


def test_every_batch_has_its_own_classes(
    model: jkoflow.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sampling.image_flow._BATCH", 2)
    x, last = own_images(4), own_images(4)[2:]
    whole, part = model.invert(x, [0, 0, 1, 2]), model.invert(last, [1, 2])
    assert torch.allclose(whole.noise[2:], part.noise, atol=1e-5)
    edited = model.edit(x, [1, 1, 2, 0], 0.5, [0, 0, 1, 2])
    assert (edited[2:].int() - model.edit(last, [2, 0], 0.5, [1, 2]).int()).abs().max() <= 1


def test_guidance_leads_the_way_back(model: jkoflow.Model) -> None:
    """That of edits and of falling paths, where the way to the noise has none."""
    z, labels = torch.randn((3, *model.latent_shape)), torch.tensor([0, 1, 2])
    guided = model._vary(None, 3.0)
    solvers, run = list(model.plan.solvers), guided.run.flow
    led = run.decode(z, solvers, condition=Condition(labels, 3.0))
    assert torch.allclose(list(guided.path(z, [1.0, 0.0], labels))[1], led, atol=1e-6)
    assert not torch.allclose(run.decode(z, solvers, condition=Condition(labels)), led, atol=1e-3)
    noise = model._flow.invert(z, labels.flip(0)).noise
    led = run.decode(noise, solvers, condition=Condition(labels, 3.0))
    assert torch.allclose(guided.edit(z, labels, 1.0, labels.flip(0)), led, atol=1e-6)
