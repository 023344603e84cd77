"""`jkoflow autoencoder convert`: from someone else's checkpoint to a latent cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import typer
import typer.testing
from safetensors import safe_open

from autoencoders import weights
from autoencoders.adapt import Adaptation
from autoencoders.registry import build_autoencoder
from pipeline.autoencoder_training.convert import convert_checkpoint
from pipeline.cli.autoencoder import convert_command, parse_shape
from pipeline.errors import UserError
from tests.autoencoders.conversion.test_diffusers_layout import write as write_folder
from tests.autoencoders.official_layout import (
    Official,
    state_of,
    write_checkpoint,
    write_yaml,
)

SHAPE = (3, 32, 32)


@pytest.fixture
def converted(tmp_path: Path) -> tuple[Official, Path, Path]:
    theirs = Official("ldm-vq-f4")
    path = write_checkpoint(tmp_path / "model.ckpt", state_of(theirs, nested=True))
    return theirs, path, write_yaml(tmp_path / "model.yaml", "ldm-vq-f4", nested=True)


def command() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("convert")(convert_command)
    return app


def run(*arguments: object) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(command(), ["convert", *map(str, arguments)])


@torch.no_grad()
def test_the_command_writes_what_the_registry_builds(
    converted: tuple[Official, Path, Path], tmp_path: Path
) -> None:
    theirs, checkpoint, description = converted
    out = tmp_path / "clean" / "vq-f4.safetensors"
    result = run(checkpoint, out, "--yaml", description, "--image-shape", "3,32,32")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(out)
    ours = build_autoencoder("pretrained", str(out), SHAPE)
    x = torch.rand(2, *SHAPE) * 2 - 1
    h = theirs.prequant(x)
    torch.testing.assert_close(ours.encode(x).mean, h, atol=1e-5, rtol=0)
    expected = theirs.image(theirs.quantised(h))
    torch.testing.assert_close(ours.decode(h), expected, atol=1e-5, rtol=0)


def test_the_origin_is_recorded(converted: tuple[Official, Path, Path], tmp_path: Path) -> None:
    _, checkpoint, description = converted
    out = tmp_path / "x.safetensors"
    done = convert_checkpoint(checkpoint, out, description, SHAPE)
    assert done.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    with safe_open(out, "pt") as file:
        notes = json.loads(file.metadata()[weights.DESCRIPTION])
    assert notes["recipe"]["converted_from"] == {
        "checkpoint": "model.ckpt",
        "sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "yaml": "model.yaml",
        "yaml_sha256": hashlib.sha256(description.read_bytes()).hexdigest(),
        "weights": "last",
    }
    assert notes["architecture"]["resolution"] == 256


def test_converting_twice_gives_the_same_bytes(
    converted: tuple[Official, Path, Path], tmp_path: Path
) -> None:
    _, checkpoint, description = converted
    both = [
        convert_checkpoint(checkpoint, tmp_path / f"{i}.safetensors", description)
        for i in range(2)
    ]
    assert both[0].sha256 == both[1].sha256
    assert both[0].model.fingerprint == both[1].model.fingerprint


def test_half_precision_halves_the_file(
    converted: tuple[Official, Path, Path], tmp_path: Path
) -> None:
    _, checkpoint, description = converted
    full = convert_checkpoint(checkpoint, tmp_path / "full.safetensors", description, SHAPE)
    half = convert_checkpoint(
        checkpoint, tmp_path / "half.safetensors", description, SHAPE, half=True
    )
    sizes = [done.path.stat().st_size for done in (full, half)]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    for name, tensor in full.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[name], tensor.half().float())


@torch.no_grad()
def test_a_folder_of_diffusers_needs_no_yaml(tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "sd-vae")
    out = tmp_path / "sd-vae.safetensors"
    result = run(tmp_path / "sd-vae", out, "--image-shape", "3,64,64")
    assert result.exit_code == 0, result.output
    ours = build_autoencoder("pretrained", str(out), (3, 64, 64))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = theirs.encode(x).latent_dist
    torch.testing.assert_close(ours.encode(x).mean, expected.mean, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(ours.encode(x).log_var, expected.logvar, atol=3e-5, rtol=3e-5)
    with safe_open(out, "pt") as file:
        origin = json.loads(file.metadata()[weights.DESCRIPTION])["recipe"]["converted_from"]
    assert (origin["checkpoint"], origin["yaml"]) == (
        "diffusion_pytorch_model.safetensors", "config.json",
    )  # fmt: skip
    with pytest.raises(UserError, match="describes itself .* remove --yaml"):
        convert_checkpoint(tmp_path / "sd-vae", out, tmp_path / "sd-vae" / "config.json")
    own = tmp_path / "sd-vae" / "diffusion_pytorch_model.safetensors"
    before = own.read_bytes()
    with pytest.raises(UserError, match="is the checkpoint; choose another name"):
        convert_checkpoint(tmp_path / "sd-vae", own, None, (3, 64, 64))
    assert own.read_bytes() == before


@torch.no_grad()
def test_digits_go_through_a_converted_rgb_autoencoder(
    converted: tuple[Official, Path, Path], tmp_path: Path
) -> None:
    _, checkpoint, description = converted
    out = tmp_path / "x.safetensors"
    convert_checkpoint(checkpoint, out, description, SHAPE)
    with pytest.raises(ValueError, match=r"x.safetensors: the images .*\(1, 28, 28\)"):
        build_autoencoder("pretrained", str(out), (1, 28, 28))
    for adaptation, shape in (
        (Adaptation("native"), (3, 7, 7)),
        (Adaptation("resize"), (3, 8, 8)),
        (Adaptation("resize", 64), (3, 16, 16)),
    ):
        ours = build_autoencoder("pretrained", str(out), (1, 28, 28), adaptation)
        assert ours.latent_shape == shape
        z = ours.encode(torch.zeros(2, 1, 28, 28)).mean
        assert tuple(z.shape) == (2, *shape)
        assert tuple(ours.decode(z).shape) == (2, 1, 28, 28)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"echo ran > {self.marker}",))


def test_a_malicious_checkpoint_raises_and_nothing_is_written(
    converted: tuple[Official, Path, Path], tmp_path: Path
) -> None:
    theirs, checkpoint, description = converted
    marker = tmp_path / "marker"
    torch.save({"state_dict": state_of(theirs), "callbacks": Payload(marker)}, checkpoint)
    out = tmp_path / "x.safetensors"
    result = run(checkpoint, out, "--yaml", description)
    assert isinstance(result.exception, ValueError)
    assert "system whose module" in str(result.exception)
    assert not marker.exists() and not out.exists()


def test_bad_arguments(converted: tuple[Official, Path, Path], tmp_path: Path) -> None:
    _, checkpoint, description = converted
    with pytest.raises(UserError, match=r"expected \*.safetensors"):
        convert_checkpoint(checkpoint, tmp_path / "x.ckpt", description)
    same = tmp_path / "same.safetensors"
    same.write_bytes(checkpoint.read_bytes())
    with pytest.raises(UserError, match="is the checkpoint; choose another name"):
        convert_checkpoint(same, same, description)
    with pytest.raises(UserError, match="--yaml is missing; expected the model.yaml"):
        convert_checkpoint(checkpoint, tmp_path / "x.safetensors", None)
    with pytest.raises(ValueError, match="input is 30x30; expected multiples of"):
        convert_checkpoint(checkpoint, tmp_path / "x.safetensors", description, (3, 30, 30))
    with pytest.raises(ValueError, match="do not fit this architecture: shapes"):
        convert_checkpoint(checkpoint, tmp_path / "x.safetensors", description, (1, 32, 32))
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("text", ["3,32", "3,32,0", "3,32,-1", "3;32;32", "rgb", ""])
def test_image_shapes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--image-shape is .*expected C,H,W"):
        parse_shape(text)


def test_image_shapes() -> None:
    assert parse_shape(None) is None
    assert parse_shape("3,32,48") == parse_shape("3x32x48") == (3, 32, 48)
