"""Feature networks of the user, built here with random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.features.networks import load_network

CPU = torch.device("cpu")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 20, 24), np.uint8))


class Means(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3)) / 255


class Maps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_torchscript_gets_the_pixels(tmp_path):
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    network = load_network(tmp_path / "means.pt", CPU)
    torch.testing.assert_close(network.features(IMAGES), IMAGES.float().mean((2, 3)) / 255)
    sizes = [IMAGES[0], IMAGES[1, :1, :9]]
    expected = torch.stack([sizes[0].float().mean((1, 2)), sizes[1].float().mean().repeat(3)])
    torch.testing.assert_close(network.features(sizes), expected / 255)
    assert network.name.startswith("means.pt@")


def test_a_folder_of_timm_equals_timm(tmp_path):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3).eval()
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": model.default_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    x = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in IMAGES])
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(load_network(tmp_path, CPU).features(IMAGES), expected)


def test_a_folder_of_open_clip_equals_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}})
    )
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    transform = open_clip.image_transform(32, is_train=False)
    x = torch.stack([transform(Image.fromarray(i.permute(1, 2, 0).numpy())) for i in IMAGES])
    with torch.no_grad():
        expected = model.encode_image(x)
    torch.testing.assert_close(load_network(tmp_path, CPU).features(IMAGES), expected)


def test_bad_networks_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no feature network at .*absent"):
        load_network(tmp_path / "absent", CPU)
    with pytest.raises(ValueError, match="is no feature network; expected config.json"):
        load_network(tmp_path, CPU)
    (tmp_path / "x.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"x\.pt is not TorchScript"):
        load_network(tmp_path / "x.pt", CPU)
    torch.jit.script(Maps()).save(tmp_path / "maps.pt")
    with pytest.raises(ValueError, match=r"for 5 images; expected \(B, d\)"):
        load_network(tmp_path / "maps.pt", CPU).features(IMAGES)
