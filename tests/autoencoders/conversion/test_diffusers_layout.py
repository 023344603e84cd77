"""Folders of diffusers' AutoencoderKL against diffusers itself, with random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoders.conversion.diffusers_layout import CONFIG, WEIGHTS, load_folder

SHAPE = (3, 32, 32)
#: Stable Diffusion's architecture at a quarter of its width, and others
LAYOUTS: dict[str, dict[str, Any]] = {
    "stable diffusion": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2},
    "attention on a level": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    },
    "sixteen channels": {
        "block_out_channels": (32, 32), "latent_channels": 16, "use_quant_conv": False,
        "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
    "no attention": {"block_out_channels": (32,), "mid_block_add_attention": False},
}  # fmt: skip


def write(folder: Path, layout: str = "attention on a level", **changes: Any) -> Any:
    """A model of diffusers with random weights, and its folder."""
    models = pytest.importorskip(
        "diffusers", reason="the optional extra diffusers is not installed"
    )
    settings = {**LAYOUTS[layout], **changes}
    levels = len(settings["block_out_channels"])
    settings.setdefault("down_block_types", ("DownEncoderBlock2D",) * levels)
    settings.setdefault("up_block_types", ("UpDecoderBlock2D",) * levels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.AutoencoderKL(**settings).eval()
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_moments_and_images_equal_those_of_diffusers(tmp_path: Path, layout: str) -> None:
    theirs, ours = write(tmp_path, layout).double(), load_folder(tmp_path, SHAPE).double()
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    moments, posterior = ours.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(moments.mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments.log_var, posterior.logvar, atol=1e-5, rtol=1e-5)
    expected = theirs.decode(posterior.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.decode(moments.mean), expected, atol=1e-5, rtol=1e-5)
    assert float(expected.std()) > 0.01 and float(posterior.logvar.std()) > 0.01


@torch.no_grad()
def test_a_pipeline_and_the_old_names_of_attention(tmp_path: Path) -> None:
    """Files before 2023, such as sd-vae-ft-mse, say query, key, value and proj_attn."""
    write(tmp_path / "pipeline" / "vae")
    expected = load_folder(tmp_path / "pipeline")
    path = tmp_path / "pipeline" / "vae" / WEIGHTS
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in load_file(path).items():
        for new, name in old.items():
            key = re.sub(rf"\.{re.escape(new)}\.", f".{name}.", key)
        tensors[key] = tensor.clone()
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, path)
    assert load_folder(tmp_path / "pipeline").fingerprint == expected.fingerprint


def test_the_size_is_that_of_the_config_or_of_the_caller(tmp_path: Path) -> None:
    write(tmp_path, sample_size=64)
    assert load_folder(tmp_path).image_shape == (3, 64, 64)
    other = load_folder(tmp_path, (3, 16, 24))
    assert (other.image_shape, other.latent_shape) == ((3, 16, 24), (4, 8, 12))
    # attention stays on the second level
    assert any(name.startswith("encoder.down.1.attn") for name in other.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "VQModel"}, "is VQModel; expected AutoencoderKL; .*name=diffusers"),
        ({"act_fn": "relu"}, "act_fn: relu; .* cannot be converted"),
        ({"norm_num_groups": 16}, "norm_num_groups: 16"),
        ({"out_channels": 1}, "out_channels: 1"),
        ({"down_block_types": ["ResnetDownsampleBlock2D"] * 2}, "down_block_types"),
        ({"block_out_channels": [64, 96]}, r"block_out_channels: \[64, 96\]"),
        ({"block_out_channels": 64}, "wrong type or size"),
        ({"block_out_channels": [0, 0]}, "wrong type or size"),
        ({"block_out_channels": [64, 64]}, "do not fit this architecture"),
        ({"latent_channels": 8}, "do not fit this architecture"),
    ],
)
def test_another_network_is_one_sentence(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words) as caught:
        load_folder(tmp_path, SHAPE)
    assert "\n" not in str(caught.value)


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / WEIGHTS
    tensors = load_file(path)
    save_file({**tensors, "encoder.conv_in.bias": torch.full((32,), torch.nan)}, path)
    with pytest.raises(ValueError, match="encoder.conv_in.bias .* is NaN or infinite"):
        load_folder(tmp_path, SHAPE)
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        load_folder(tmp_path, SHAPE)
    (tmp_path / CONFIG).write_text("[")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        load_folder(tmp_path, SHAPE)
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks {WEIGHTS}"):
        load_folder(tmp_path, SHAPE)
