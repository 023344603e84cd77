"""Stored autoencoders: what is loaded is what was stored, and misfits are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from autoencoders.base import module_fingerprint, to_float, to_uint8
from autoencoders.identity import IdentityAutoencoder
from autoencoders.registry import build_autoencoder
from autoencoders.weights import (
    DESCRIPTION,
    load_weights,
    locate_weights,
    require_fitting,
    shipped_weights,
    to_tensors,
)
from pipeline.integrity.digests import BLANK, stamp
from tests.autoencoders.models import model, x_of


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    tensors, metadata = to_tensors(model().freeze(), recipe={"seconds": 3})
    path.write_bytes(stamp(save(tensors, metadata)))
    return path


@torch.no_grad()
def test_round_trip_up_to_half_precision(stored: Path) -> None:
    original, loaded = model().freeze(), load_weights(stored)
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    torch.testing.assert_close(
        loaded.encode(x_of(2)).mean, original.encode(x_of(2)).mean, rtol=0, atol=5e-3
    )
    assert loaded.config == original.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_fingerprint_is_of_the_stored_weights(stored: Path, tmp_path: Path) -> None:
    first = load_weights(stored)
    assert first.fingerprint == load_weights(stored).fingerprint
    assert first.fingerprint != model().freeze().fingerprint  # which are not rounded
    again = tmp_path / "again.safetensors"
    again.write_bytes(stamp(save(*to_tensors(first))))
    assert load_weights(again).fingerprint == first.fingerprint


def test_the_fingerprint_sees_every_weight_and_the_architecture() -> None:
    seen = {model().freeze().fingerprint}
    for name in ("decoder.conv_out.bias", "quant_conv.weight", "encoder.conv_in.weight"):
        autoencoder = model()
        autoencoder.get_parameter(name).data.view(-1)[0] += 1e-6
        seen.add(autoencoder.freeze().fingerprint)
    autoencoder = model(canvas=12, patch=3, dropout=0.1)  # the same tensors
    seen.add(autoencoder.freeze().fingerprint)
    assert len(seen) == 5


def test_the_notes_are_kept(stored: Path) -> None:
    from safetensors import safe_open

    with safe_open(stored, "pt") as file:
        notes = json.loads(file.metadata()[DESCRIPTION])
    assert notes["recipe"] == {"seconds": 3}
    assert notes["architecture"]["embed_dim"] == 2


def test_keys_that_do_not_fit_are_named() -> None:
    autoencoder = model()
    tensors = dict(autoencoder.state_dict())
    tensors["decoder.extra"] = torch.zeros(1)
    del tensors["quant_conv.bias"]
    tensors["post_quant_conv.weight"] = torch.zeros(3, 5, 1, 1)
    with pytest.raises(ValueError) as caught:
        require_fitting(autoencoder, tensors, "here")
    said = str(caught.value)
    assert "the weights in here do not fit" in said
    assert "missing: quant_conv.bias" in said
    assert "unexpected: decoder.extra" in said
    assert "post_quant_conv.weight is (3, 5, 1, 1), expected (3, 2, 1, 1)" in said


def test_many_faults_are_counted() -> None:
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        require_fitting(model(), {}, "here")


def test_files_that_are_none(tmp_path: Path, stored: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(stored.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_weights(path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_weights(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no jkoflow autoencoder"):
        load_weights(path)
    save_file({"x": torch.zeros(1)}, path, {DESCRIPTION: "{}"})
    with pytest.raises(ValueError, match="holds no digest of its content"):
        load_weights(path)
    for metadata in ("{", "{}", "[]", '{"architecture": 1}', '{"architecture": {"colour": 1}}'):
        notes = {DESCRIPTION: metadata, "seal": BLANK}
        path.write_bytes(stamp(save({"x": torch.zeros(1)}, notes)))
        with pytest.raises(ValueError, match="description|unknown|colour"):
            load_weights(path)


def test_names_and_paths(stored: Path) -> None:
    assert locate_weights(str(stored)) == stored
    for name, path in shipped_weights().items():
        assert locate_weights(name) == path
    with pytest.raises(ValueError, match="weights are 'nothing'; expected one of"):
        locate_weights("nothing")


def test_the_registry_checks_the_shape(stored: Path) -> None:
    assert (
        build_autoencoder("pretrained", str(stored), (1, 10, 10)).fingerprint
        == load_weights(stored).fingerprint
    )
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\); expected \(1, 10, 10\)"):
        build_autoencoder("pretrained", str(stored), (3, 32, 32))
    with pytest.raises(ValueError, match="is 'vae'; expected one of .*identity"):
        build_autoencoder("vae", None, (1, 10, 10))
    with pytest.raises(ValueError, match=r"autoencoder\.weights"):
        build_autoencoder("pretrained", None, (1, 10, 10))


def test_identity() -> None:
    autoencoder = build_autoencoder("identity", None, (1, 10, 10))
    assert isinstance(autoencoder, IdentityAutoencoder)
    x = x_of(2)
    assert torch.equal(autoencoder.encode(x).mean, x) and autoencoder.encode(x).log_var is None
    assert torch.equal(autoencoder.decode(3 * x), (3 * x).clamp(-1, 1))
    assert autoencoder.fingerprint == build_autoencoder("identity", None, (1, 10, 10)).fingerprint
    assert autoencoder.fingerprint != build_autoencoder("identity", None, (1, 8, 8)).fingerprint
    with pytest.raises(ValueError, match="the images have the shape"):
        autoencoder.encode(x_of(2, shape=(1, 8, 8)))


def test_pixels_survive_the_round_trip() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(pixels)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), pixels)
    wild = torch.tensor([-1e9, -1.004, 1.004, 1e9, 0.5 / 127.5, 1.6 / 127.5])
    assert to_uint8(wild).tolist() == [0, 0, 255, 255, 128, 129]


def test_the_fingerprint_does_not_depend_on_the_order_of_a_description() -> None:
    autoencoder = model()
    assert module_fingerprint({"a": 1, "b": 2}, autoencoder) == module_fingerprint(
        {"b": 2, "a": 1}, autoencoder
    )
