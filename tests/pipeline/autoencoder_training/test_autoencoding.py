"""`jkoflow autoencoder train | evaluate`, end to end on small pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

from autoencoders.base import to_float, to_uint8
from autoencoders.weights import load_weights, to_tensors
from eval.reconstruction import psnr
from pipeline.autoencoder_training.train import WEIGHTS, train_autoencoder
from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.load import load as load_any
from pipeline.data.datasets import load_images
from pipeline.evaluation.real_images import subset_indices
from pipeline.runtime.rng import generator
from pipeline.storage import atomic
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from tests.pipeline.evaluation.test_evaluator import distance
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.glance import stand_in
from tests.pipeline.tiny import (
    World,
    child,
    pictures,
    run_child,
    say,
    write_autoencoder,
    write_pictures,
)

RECIPE = {
    "iterations": 6, "batch_size": 8, "adversarial_start": 3, "kl_weight": 0.0,
    "discriminator_width": 4, "discriminator_layers": 1, "lr": 6e-2,
}  # fmt: skip
SHAPE = {"patch": 4, "width": 32, "width_factors": [1], "channels": 2, "codebook": 16}


def recipe_of(world: World, **changes: object) -> str:
    path = world.root / "recipe.yaml"
    sections = {"data": world.settings["data"], "architecture": SHAPE}
    path.write_text(yaml.safe_dump({**sections, "training": {**RECIPE, **changes}}))
    return str(path)


def load_recipe(path: str, overrides: Sequence[str] = ()) -> AutoencoderConfig:
    config = load_any(AutoencoderConfig, path, overrides, packaged.AUTOENCODERS)
    often = dataclasses.replace(config.training, checkpoint_seconds=0.0)
    return dataclasses.replace(config, training=often)


def test_train_then_evaluate(
    capsys: pytest.CaptureFixture[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = world.root / "ae"
    code, said, _ = say(capsys, "autoencoder", "train", "--config", recipe_of(world), "--out", out)
    assert (code, said.strip()) == (0, str(out / WEIGHTS))
    model = load_weights(out / WEIGHTS)
    assert model.config.ch == 32 and model.latent_shape == (2, 3, 3)
    assert (out / "before_after.png").read_bytes().startswith(b"\x89PNG")
    *steps, end = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert end["event"] == "finished" and end["seconds"] > 0
    notes = (out / WEIGHTS).read_bytes()[:20_000]
    assert b'\\"parameters' in notes and b'\\"seconds' not in notes  # no clock in the weights
    assert steps[-1]["step"] == 6 and "discriminator" in steps[-1]
    # a training that is there is not trained over
    code, _, last = say(capsys, "autoencoder", "train", "--config", recipe_of(world), "--out", out)
    assert code == 2 and "there is a training at" in last and "--resume" in last

    stand_in(monkeypatch)
    reference = world.root / "pictures" / "train"
    use = ["--weights", out / WEIGHTS, "--out", out, "--reference", reference, "-n", "20"]
    words = ["autoencoder", "evaluate", "--config", recipe_of(world), *use]
    code, said, last = say(capsys, *words)
    assert code == 0, last
    result = json.loads((out / "autoencoder.json").read_text())
    assert said.strip() == str(out / "autoencoder.json")
    data = load_recipe(recipe_of(world), ["data.split=test"]).data
    order = subset_indices(load_images(data), 20)
    images = torch.from_numpy(pictures(24, seed=2)[order, None])
    with torch.inference_mode():
        z = model.encode(to_float(images)).sample(generator(0, "reconstruct", 0))
        again = to_uint8(model.decode(z))
    assert result["psnr"] == pytest.approx(float(psnr(images, again).mean()), rel=1e-3)
    assert result["n"] == 20 and result["rfid"]["n"] == 20 and result["rfid"]["value"] > 0
    with torch.inference_mode():
        drawn = model.encode(to_float(images)).sample(generator(0, "floor", 0))
        decoded = to_uint8(model.decode(drawn)).numpy()
    before, real = images.numpy(), pictures(40, seed=1)[:, None]
    for key, pair in (
        ("rfid", (decoded, real)), ("rfid_originals", (decoded, before)),
        ("real_fid", (before, real)),
    ):  # fmt: skip
        assert result[key]["value"] == pytest.approx(distance(*pair), rel=1e-3), key
    np.testing.assert_allclose(result["latents"]["mean"], z.mean((0, 2, 3)), atol=1e-4)
    assert result["fingerprint"] == model.fingerprint
    assert result["weights"] == str(out / WEIGHTS)
    assert say(capsys, *words[:4], *use[2:])[0] == 0  # what was trained there, by itself
    other = world.settings["autoencoder"]["weights"]
    code, _, last = say(capsys, *words[:4], "--weights", other, *use[2:])
    assert code == 2 and f"expected {out / WEIGHTS}, the autoencoder trained in" in last
    for n, named in (("1", "at least 2"), ("25", "25 images were asked for")):
        words[-1] = n
        code, _, last = say(capsys, *words)
        assert code == 2 and named in last


def test_a_gumbel_encoder_cannot_be_trained(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    out, weights = world.root / "gumbel", world.root / "gumbel.safetensors"
    write_autoencoder(weights, flavour="gumbel")
    words = ["--set", f"training.start={weights}"]
    code, _, last = say(
        capsys, "autoencoder", "train", "--config", recipe_of(world), "--out", out, *words
    )
    assert code == 2 and "is of the flavour gumbel; expected kl or vq" in last
    assert not out.exists()


def test_channels_are_measured_over_all_of_the_set(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set may be sorted by class: its first images are no fair sample of it."""
    seen = []
    monkeypatch.setattr("pipeline.autoencoder_training.train._POSTPROCESSING_IMAGES", 10)
    monkeypatch.setattr(
        "pipeline.autoencoder_training.trainer.without_unused_channels",
        lambda model, images, least: seen.append(images) or model,
    )
    config = load_recipe(recipe_of(world))
    train_autoencoder(config, world.root / "ae", Accelerator(cpu=True), quiet, resume=False)
    images = load_images(config.data)
    assert np.array_equal(seen[0].numpy(), images.take(subset_indices(images, 10)))
    assert not np.array_equal(seen[0].numpy(), images.read(0, 10))


@pytest.mark.parametrize("flavour", ["kl", "vq"])
def test_stopped_and_resumed_ends_in_the_same_weights(
    world: World, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, flavour: str
) -> None:
    config = load_recipe(recipe_of(world), [f"architecture.flavour={flavour}"])
    train_autoencoder(config, world.root / "whole", accelerator, quiet, resume=False)

    class Stopped(Exception):
        pass

    def stops(items: object, total: int, label: str) -> object:
        for count, item in enumerate(items):  # type: ignore[arg-type]
            if count == 4:  # the fifth step of this call
                raise Stopped
            yield item

    with pytest.raises(Stopped):
        train_autoencoder(config, world.root / "again", accelerator, stops, resume=False)  # type: ignore[arg-type]
    assert not (world.root / "again" / WEIGHTS).exists()
    train_autoencoder(config, world.root / "again", accelerator, quiet, resume=True)
    first, second = (
        load_weights(world.root / "whole" / WEIGHTS),
        load_weights(world.root / "again" / WEIGHTS),
    )
    assert first.fingerprint == second.fingerprint


def test_another_configuration_is_not_continued(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    config, out = recipe_of(world, iterations=1, adversarial_weight=0.0), world.root / "ae"
    words = ["autoencoder", "train", "--config", config, "--out", out]
    assert say(capsys, *words)[0] == 0
    words.append("--resume")
    assert say(capsys, *words)[0] == 0
    assert say(capsys, *words, "--set", "data.test_split=other")[0] == 0
    weights = (out / WEIGHTS).read_bytes()
    for changed, told in (
        ("training.iterations=2", "training.iterations=1 (now 2)"),
        ("architecture.width=64", "architecture.width=32 (now 64)"),
        ("data.limit=20", "data.limit=None (now 20)"),
    ):
        code, _, last = say(capsys, *words, "--set", changed)
        assert code == 2 and f"was started with {told}; continue it as it was started" in last
    assert (out / WEIGHTS).read_bytes() == weights


def test_a_training_continues_on_the_same_images_alone(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    config, out = recipe_of(world, iterations=1, adversarial_weight=0.0), world.root / "ae"
    first, moved = world.root / "first", world.root / "moved"
    write_pictures(first, 10, seed=3)
    words = ["autoencoder", "train", "--config", config, "--out", out, "--set"]
    assert say(capsys, *words, f"data.path={first}")[0] == 0
    weights = (out / WEIGHTS).read_bytes()
    first.rename(moved)
    assert say(capsys, *words, f"data.path={moved}", "--resume")[0] == 0
    assert (out / WEIGHTS).read_bytes() == weights
    assert f"path: {moved}" in (out / "config.yaml").read_text()
    other = write_pictures(world.root / "other", 10, seed=4)
    code, _, last = say(capsys, *words, f"data.path={other}", "--resume")
    assert code == 2 and "are not those that the training at" in last
    next(moved.rglob("*.png")).unlink()
    code, _, last = say(capsys, *words, f"data.path={moved}", "--resume")
    assert code == 2 and "are not those that the training was started with" in last
    assert (out / WEIGHTS).read_bytes() == weights


def test_killed_before_its_environment_was_written(world: World) -> None:
    config, out = recipe_of(world, iterations=1, adversarial_weight=0.0), world.root / "ae"
    arguments = ["autoencoder", "train", "--config", config, "--out", out]
    process = child(arguments, world.environment, die_at=2)  # the first is the index of files
    process.start()
    process.join()
    assert {path.name for path in out.iterdir()} == {"SHA256SUMS", "config.yaml"}
    run_child(*arguments, "--resume", env=world.environment)
    assert json.loads((out / "environment.json").read_text())["versions"]["torch"]


def test_pictures_of_another_shape(capsys: pytest.CaptureFixture[str], world: World) -> None:
    out = world.root / "ae"
    words = ["autoencoder", "train", "--config", recipe_of(world), "--out", out]
    code, _, last = say(capsys, *words, "--set", "training.start=rgb32-kl")
    assert code == 2
    assert "have the shape (1, 12, 12); expected (3, 32, 32), as training.start=rgb32-kl" in last
    assert not out.exists()


def test_pictures_too_small_for_ssim(
    capsys: pytest.CaptureFixture[str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    reference = world.root / "pictures" / "train"
    words = ["autoencoder", "evaluate", "--config", recipe_of(world), "--set", "data.size=10"]
    words += ["--kind", "identity", "--reference", reference, "--out", world.root / "ae"]
    code, _, last = say(capsys, *words, "-n", "20")
    assert code == 0, last
    result = json.loads((world.root / "ae" / "autoencoder.json").read_text())
    assert result["ssim"] is None and result["n"] == 20
    assert result["rfid_originals"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["rfid"]["value"] == pytest.approx(result["real_fid"]["value"])
    assert say(capsys, *words, "-n", "20", "--no-originals")[0] == 0
    assert "real_fid" not in json.loads((world.root / "ae" / "autoencoder.json").read_text())


def test_a_handful_of_pictures_is_enough(
    capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path
) -> None:
    few = write_pictures(tmp_path / "few", 3, seed=9)
    out = world.root / "ae"
    words = ["autoencoder", "train", "--config", recipe_of(world), "--out", out]
    code, _, last = say(capsys, *words, "--set", f"data.path={few}")
    assert code == 0, last
    assert load_weights(out / WEIGHTS).fingerprint


def test_without_steps_only_the_mask_is_measured(
    capsys: pytest.CaptureFixture[str], world: World
) -> None:
    """For a decoder that is used on other images than it was trained on: its weights are kept."""
    first, out = world.root / "first", world.root / "masked"
    words = ("autoencoder", "train", "--config")
    assert say(capsys, *words, recipe_of(world), "--out", first)[0] == 0
    before, dull = load_weights(first / WEIGHTS), world.root / "dull.safetensors"
    for part in before.decoder.conv_out.parameters():
        part.data.mul_(0.1)  # with less detail than any picture
    for part in before.quant_conv.parameters():
        part.data[[0, before.config.embed_dim]] = 0.0  # a channel without information
    before.encoder.conv_in.weight.data.add_(1e-6)  # no half precision holds it
    atomic.write_tensors(dull, *to_tensors(before, torch.float32))
    before = load_weights(dull)
    # a channel that a training would remove is kept, too
    recipe = recipe_of(world, iterations=0, start=str(dull), sharpen=True)
    assert say(capsys, *words, recipe, "--out", out)[0] == 0
    after = load_weights(out / WEIGHTS)
    assert before.config.sharpen == 0 < after.config.sharpen
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    no = world.root / "no"
    for given in ({"sharpen": True}, {"start": str(dull)}):
        recipe = recipe_of(world, iterations=0, **given)
        code, _, error = say(capsys, *words, recipe, "--out", no)
        assert code == 2 and "expected at least 1, or training.start and" in error
    assert not no.exists()


def test_the_seconds_of_a_stopped_training_count(world: World) -> None:
    config, out = load_recipe(recipe_of(world)), world.root / "ae"
    train_autoencoder(config, out, Accelerator(cpu=True), quiet, resume=False)
    state = load_checkpoint(out / "checkpoint.safetensors")
    save_checkpoint(out / "checkpoint.safetensors", {**state, "seconds": 1000.0})
    train_autoencoder(config, out, Accelerator(cpu=True), quiet, resume=True)
    end = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "finished" and end["seconds"] >= 1000
