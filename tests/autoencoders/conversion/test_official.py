"""Official checkpoints against what the official models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from autoencoders.conversion import official
from autoencoders.taming import TamingAutoencoder
from tests.autoencoders.official_layout import (
    LAYOUTS,
    Callback,
    Official,
    description,
    state_of,
    write_checkpoint,
    write_yaml,
)

SHAPE = (3, 32, 32)


def images(n: int = 2, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make(
    folder: Path, layout: str, nested: bool = False, form: str = "zip", averaged: bool = False
) -> tuple[Official, Path, Path]:
    model = Official(layout)
    path = write_checkpoint(folder / "model.ckpt", state_of(model, nested, averaged), form)
    return model, path, write_yaml(folder / "model.yaml", layout, nested)


@torch.no_grad()
def assert_same(ours: TamingAutoencoder, theirs: Official, x: torch.Tensor) -> None:
    """Same latents, same quantised latents, same images, to 1e-5."""
    moments, h = ours.encode(x), theirs.prequant(x)
    if ours.stochastic:
        mean, log_var = h.chunk(2, dim=1)
        torch.testing.assert_close(moments.mean, mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(moments.log_var, log_var.clamp(-30, 20), atol=1e-5, rtol=0)
        z = mean
    else:
        assert moments.log_var is None
        torch.testing.assert_close(moments.mean, h, atol=1e-5, rtol=0)
        z = theirs.quantised(h)
        torch.testing.assert_close(ours.quantise(h)[0], z, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.decode(moments.mean), theirs.image(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_official_layout_gives_the_official_latents_and_images(
    tmp_path: Path, layout: str
) -> None:
    theirs, path, description_path = make(tmp_path, layout)
    ours = official.load_official(path, description_path, SHAPE)
    factor = 2 ** (len(LAYOUTS[layout][1]["ch_mult"]) - 1)
    assert ours.latent_shape == (LAYOUTS[layout][2], 32 // factor, 32 // factor)
    assert_same(ours, theirs, images())


def test_attention_sits_where_the_yaml_resolution_puts_it(tmp_path: Path) -> None:
    _, path, description_path = make(tmp_path, "vqgan-f16-1024")
    ours = official.load_official(path, description_path, SHAPE)
    names = set(ours.state_dict())
    # 16 of 256 is the fifth level, whatever the size of the images
    assert "encoder.down.4.attn.0.q.weight" in names
    assert not any(f"encoder.down.{i}.attn.0.q.weight" in names for i in range(4))
    assert ours.config.resolution == 256


def test_images_need_not_be_square(tmp_path: Path) -> None:
    theirs, path, description_path = make(tmp_path, "ldm-kl-f8")
    ours = official.load_official(path, description_path, (3, 16, 40))
    assert ours.latent_shape == (4, 2, 5)
    assert_same(ours, theirs, images(1, (3, 16, 40)))


def test_the_default_image_is_of_the_yaml_resolution(tmp_path: Path) -> None:
    _, path, description_path = make(tmp_path, "ldm-vq-f4")
    ours = official.load_official(path, description_path)
    assert (ours.image_shape, ours.latent_shape) == ((3, 256, 256), (3, 64, 64))


@pytest.mark.parametrize("form", ["zip", "stream", "safetensors"])
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_every_form_alone_or_within_a_whole_model(tmp_path: Path, form: str, nested: bool) -> None:
    Callback.ran.clear()
    theirs, path, description_path = make(tmp_path, "ldm-vq-f4-noattn", nested, form)
    assert_same(official.load_official(path, description_path, SHAPE), theirs, images())
    assert not Callback.ran


def test_a_first_stage_yaml_opens_a_whole_model_and_the_reverse(tmp_path: Path) -> None:
    theirs, whole, whole_yaml = make(tmp_path, "ldm-kl-f4", nested=True)
    alone_yaml = write_yaml(tmp_path / "alone.yaml", "ldm-kl-f4")
    alone = write_checkpoint(tmp_path / "alone.ckpt", state_of(theirs))
    for path, yaml_path in ((whole, alone_yaml), (alone, whole_yaml)):
        assert_same(official.load_official(path, yaml_path, SHAPE), theirs, images(1))


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_averaged_weights_are_taken_when_asked_for(tmp_path: Path, nested: bool) -> None:
    theirs, path, description_path = make(tmp_path, "ldm-vq-f4", nested, averaged=True)
    last = official.load_official(path, description_path, SHAPE)
    averaged = official.load_official(path, description_path, SHAPE, averaged=True)
    for name, tensor in last.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], atol=0, rtol=0)
        torch.testing.assert_close(averaged.state_dict()[name], tensor / 2, atol=0, rtol=0)


def test_averaged_weights_that_are_not_there(tmp_path: Path) -> None:
    _, path, description_path = make(tmp_path, "ldm-vq-f4")
    with pytest.raises(ValueError, match="holds no averaged weights"):
        official.load_official(path, description_path, SHAPE, averaged=True)


def test_an_averaging_codebook_is_read(tmp_path: Path) -> None:
    theirs, _, description_path = make(tmp_path, "vqgan-f16-1024")
    state = state_of(theirs)
    state["quantize.embedding.cluster_size"] = torch.ones(32)
    state["quantize.embedding.embed_avg"] = torch.zeros(32, 256)
    path = write_checkpoint(tmp_path / "ema.ckpt", state)
    assert_same(official.load_official(path, description_path, SHAPE), theirs, images(1))


def test_gumbel_logits_choose_the_entry(tmp_path: Path) -> None:
    theirs, path, description_path = make(tmp_path, "gumbel-f8")
    ours = official.load_official(path, description_path, SHAPE)
    with torch.no_grad():
        h = ours.encode(images()).mean
        logits = theirs.quantize.proj(h)
        assert torch.equal(logits.argmax(1).flatten(), ours.quantise(h)[2])


def test_half_precision_and_its_overflow(tmp_path: Path) -> None:
    theirs, _, description_path = make(tmp_path, "ldm-kl-f4")
    state = {k: v.half() for k, v in state_of(theirs).items()}
    ours = official.load_official(
        write_checkpoint(tmp_path / "half.ckpt", state), description_path, SHAPE
    )
    weight = ours.state_dict()["decoder.conv_in.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, state["decoder.conv_in.weight"].float())
    state["decoder.conv_in.weight"][0] = torch.inf
    path = write_checkpoint(tmp_path / "overflow.ckpt", state)
    with pytest.raises(ValueError, match="decoder.conv_in.weight contains NaN or infinity"):
        official.load_official(path, description_path, SHAPE)


def change(state: dict[str, torch.Tensor], how: str) -> None:
    if how == "missing":
        del state["decoder.conv_out.bias"]
    elif how == "unexpected":
        state["decoder.extra.weight"] = torch.zeros(1)
    elif how == "shape":
        state["quant_conv.weight"] = torch.zeros(5, 3, 1, 1)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "missing: decoder.conv_out.bias"),
        ("unexpected", "unexpected: decoder.extra.weight"),
        ("shape", r"quant_conv.weight is \(5, 3, 1, 1\), expected \(3, 3, 1, 1\)"),
    ],
)
def test_keys_that_do_not_fit_are_named(tmp_path: Path, how: str, words: str) -> None:
    theirs, _, description_path = make(tmp_path, "ldm-vq-f4")
    state = state_of(theirs)
    change(state, how)
    with pytest.raises(ValueError, match=words):
        official.load_official(
            write_checkpoint(tmp_path / "x.ckpt", state), description_path, SHAPE
        )


def test_the_yaml_of_another_checkpoint(tmp_path: Path) -> None:
    _, path, _ = make(tmp_path, "ldm-vq-f4")
    wrong = write_yaml(tmp_path / "wrong.yaml", "ldm-vq-f8")
    with pytest.raises(ValueError, match="do not fit this architecture: missing: decoder.up"):
        official.load_official(path, wrong, SHAPE)


def test_a_checkpoint_of_a_transformer_alone(tmp_path: Path) -> None:
    description_path = write_yaml(tmp_path / "model.yaml", "vqgan-f16-1024")
    state = {"transformer.tok_emb.weight": torch.zeros(4, 4), "transformer.head": torch.zeros(4)}
    path = write_checkpoint(tmp_path / "transformer.ckpt", state)
    with pytest.raises(ValueError, match="holds tensors of .*transformer.*first stage"):
        official.load_official(path, description_path, SHAPE)


def edited(tmp_path: Path, layout: str, **values: Any) -> Path:
    content = description(layout)
    content["model"]["params"]["ddconfig"] |= values
    path = tmp_path / "edited.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("layout", "values", "words"),
    [
        ("ldm-vq-f4", {"attn_type": "linear"}, "attn_type is 'linear'; expected vanilla or none"),
        ("ldm-vq-f4", {"tanh_out": True}, "tanh_out: True"),
        ("ldm-vq-f4", {"resamp_with_conv": False}, "resamp_with_conv: False"),
        ("ldm-vq-f4", {"window": 7}, "window: 7"),
        ("ldm-vq-f4", {"double_z": True}, "target is .*VQModel and double_z True"),
        ("ldm-kl-f4", {"double_z": False}, "target is .*AutoencoderKL and double_z False"),
        ("ldm-vq-f4", {"out_ch": 1}, "out_ch is 1"),
        ("ldm-vq-f4", {"ch_mult": None}, "wrong type"),
        ("gumbel-f8", {"z_channels": 128}, "z_channels is 128 and embed_dim"),
        ("ldm-vq-f4", {"ch": "wide"}, "wide"),
    ],
)
def test_a_yaml_that_asks_for_another_network(
    tmp_path: Path, layout: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        official.architecture_of(official.read_yaml(edited(tmp_path, layout, **values)), SHAPE)


def test_unusual_keys_may_have_their_usual_values(tmp_path: Path) -> None:
    path = edited(
        tmp_path, "ldm-vq-f4", tanh_out=False, resamp_with_conv=True, attn_type="vanilla"
    )
    assert official.architecture_of(official.read_yaml(path), SHAPE).flavour == "vq"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not a readable yaml"),
        ("- 1\n- 2\n", "has no model.params"),
        ("model: {target: a.b}", "has no model.params"),
        ("model: {target: a.Net2Net, params: {transformer_config: {}}}", "has no ddconfig"),
        ("model: !!python/object/apply:os.getcwd []", "not a readable yaml"),
    ],
)
def test_files_that_are_no_description(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        official.read_yaml(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model description"):
        official.read_yaml(tmp_path / "model.yaml")
    description_path = write_yaml(tmp_path / "model.yaml", "ldm-vq-f4")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        official.load_official(tmp_path / "model.ckpt", description_path)
