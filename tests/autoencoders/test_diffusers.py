"""diffusers' autoencoders: twins of official checkpoints give the same latents and images."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoders import diffusers as ours
from autoencoders.adapt import Adaptation
from autoencoders.conversion import official
from autoencoders.registry import build_autoencoder
from tests.autoencoders.official_layout import (
    LAYOUTS,
    Official,
    description,
    state_of,
    write_checkpoint,
    write_yaml,
)

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="the optional extra diffusers is not installed",
)
SHAPE = (3, 32, 32)
_RENAMED = (
    (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d)\.attn\.(\d)\.", r".down_blocks.\1.attentions.\2."),
    (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d)\.block\.(\d)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d)\.attn\.(\d)\.", r".up_blocks.\1.attentions.\2."),
    (r"\.up\.(\d)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"nin_shortcut", "conv_shortcut"),
    (r"coder\.norm_out", "coder.conv_norm_out"),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def twin_state(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """Official names and shapes to those of diffusers."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, name in _RENAMED:
            key = re.sub(pattern, name, key)
        # the decoder's levels are counted from the other end
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key)
        if ".attentions." in key:
            head, part, kind = key.rsplit(".", 2)
            key = f"{head}.{_ATTENTION[part]}.{kind}"
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        if not key.startswith("loss."):
            renamed[key] = tensor
    return renamed


def write_twin(folder: Path, theirs: Official, layout: str, **config: Any) -> Path:
    """An official model as a folder that diffusers reads."""
    import diffusers

    params = description(layout)["model"]["params"]
    dd = params["ddconfig"]
    levels = len(dd["ch_mult"])
    attends = [256 >> i in dd["attn_resolutions"] for i in range(levels)]
    shared = {
        "block_out_channels": [32 * m for m in dd["ch_mult"]], "layers_per_block": 1,
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in reversed(attends)],
        "mid_block_add_attention": dd.get("attn_type") != "none", **config,
    }  # fmt: skip
    shared["latent_channels"] = dd["z_channels"]
    if dd["double_z"]:
        twin = diffusers.AutoencoderKL(**shared)
    else:
        twin = diffusers.VQModel(
            **shared, num_vq_embeddings=params["n_embed"], vq_embed_dim=params["embed_dim"]
        )
    twin.load_state_dict(twin_state(theirs.state_dict(), levels))
    twin.save_pretrained(folder)
    return folder


def pair(tmp_path: Path, layout: str, **config: Any) -> tuple[Any, ours.DiffusersAutoencoder]:
    theirs = Official(layout)
    path = write_checkpoint(tmp_path / "model.ckpt", state_of(theirs))
    a = official.load_official(path, write_yaml(tmp_path / "model.yaml", layout), SHAPE)
    folder = write_twin(tmp_path / "twin", theirs, layout, **config)
    return a, ours.load_diffusers(str(folder), SHAPE[1:])


def images(n: int = 2) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1


def close(a: Tensor, b: Tensor) -> None:
    # in float64 the two must be one function; in float32 they are two orders of the same sums,
    # and a pixel in thousands rounds a little beyond 1e-5, which one depends on the threads
    tolerance = 1e-9 if a.dtype == torch.float64 else 3e-5
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@needs_diffusers
@DTYPES
@pytest.mark.parametrize("layout", ["ldm-kl-f4", "ldm-kl-f8", "ldm-kl-f16"])
@torch.no_grad()
def test_a_kl_checkpoint_and_its_twin(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    a, b = pair(tmp_path, layout, scaling_factor=1.0)
    assert a.latent_shape == b.latent_shape and b.stochastic
    a, b, x = a.to(dtype), b.to(dtype), images().to(dtype)
    close(b.encode(x).mean, a.encode(x).mean)
    close(b.encode(x).log_var, a.encode(x).log_var)
    close(b.decode(a.encode(x).mean), a.decode(a.encode(x).mean))


@needs_diffusers
@DTYPES
@pytest.mark.parametrize("layout", ["ldm-vq-f4", "ldm-vq-f4-noattn", "ldm-vq-f8", "ldm-vq-f16"])
@torch.no_grad()
def test_a_vq_checkpoint_and_its_twin(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    # the twin's config.json says 0.18215, as every VQModel's does; its latents are not scaled
    a, b = pair(tmp_path, layout)
    written = json.loads((tmp_path / "twin" / "config.json").read_text())
    assert written["scaling_factor"] == 0.18215 and b.scale == 1.0
    assert a.latent_shape == b.latent_shape and not b.stochastic
    assert b.codebook_size == a.codebook_size == LAYOUTS[layout][3]
    a, b, x = a.to(dtype), b.to(dtype), images().to(dtype)
    z = a.encode(x).mean
    close(b.encode(x).mean, z)
    assert torch.equal(b.quantise(z)[2], a.quantise(z)[2])
    close(b.quantise(z)[0], a.quantise(z)[0])
    close(b.quantise(z)[1], a.quantise(z)[1])
    close(b.decode(z), a.decode(z))
    close(b.decode(z), b.model.decode(z).sample.clamp(-1, 1))  # diffusers' own quantiser


@needs_diffusers
@torch.no_grad()
def test_scale_and_shift_of_the_config_are_applied_and_undone(tmp_path: Path) -> None:
    a, b = pair(tmp_path, "ldm-kl-f4", scaling_factor=0.3611, shift_factor=0.1159)
    x = images()
    raw, actual = a.encode(x), b.encode(x)
    close(actual.mean, (raw.mean - 0.1159) * 0.3611)
    close(actual.log_var, raw.log_var + 2 * math.log(0.3611))
    # a posterior sample, and not only its mean, is the scaled sample of the raw posterior
    draws = [m.sample(torch.Generator().manual_seed(5)) for m in (raw, actual)]
    close(draws[1], (draws[0] - 0.1159) * 0.3611)
    close(b.decode(actual.mean), a.decode(raw.mean))
    assert (b.describe()["scale"], b.describe()["shift"]) == (0.3611, 0.1159)


@needs_diffusers
@torch.no_grad()
def test_a_size_changes_the_fingerprint_and_a_bad_scale_is_an_error(tmp_path: Path) -> None:
    _, b = pair(tmp_path, "ldm-vq-f4")
    assert b.fingerprint != b.reshaped((3, 64, 32)).fingerprint
    with pytest.raises(ValueError, match="scale is 0.0 and shift 0.0; expected"):
        pair(tmp_path, "ldm-kl-f4", scaling_factor=0.0)


@needs_diffusers
@torch.no_grad()
def test_a_tiny_autoencoder(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    widths = (16, 16, 16)
    theirs = diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.5,
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    b = build_autoencoder("diffusers", str(tmp_path), SHAPE)
    assert b.latent_shape == (4, 8, 8) and not b.stochastic
    x = images()
    z = b.encode(x).mean
    close(z, theirs.encode(x).latents * 0.5)
    close(b.decode(z), theirs.decode(z / 0.5).sample.clamp(-1, 1))
    with pytest.raises(ValueError, match="is a AutoencoderTiny; expected a VQModel"):
        b.quantise(z)


@needs_diffusers
def test_a_pipeline_folder_loads_and_other_models_raise(tmp_path: Path) -> None:
    theirs = Official("ldm-kl-f4")
    write_twin(tmp_path / "pipeline" / "vae", theirs, "ldm-kl-f4")
    assert ours.load_diffusers(str(tmp_path / "pipeline"), (32, 32)).latent_shape == (3, 8, 8)
    with pytest.raises(ValueError, match="are 30x30; expected sides that are multiples of 4"):
        ours.load_diffusers(str(tmp_path / "pipeline"), (30, 30))
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded from its folder"):
        ours.load_diffusers(str(tmp_path / "pipeline"), (32, 32))
    (tmp_path / "pipeline" / "vae" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(
        ValueError, match="its class is UNet2DModel; expected one of AutoencoderKL"
    ):
        ours.load_diffusers(str(tmp_path / "pipeline"), (32, 32))


@needs_diffusers
def test_resizing_without_a_size_takes_the_models_own(tmp_path: Path) -> None:
    theirs = Official("ldm-kl-f4")
    folder = write_twin(tmp_path / "vae", theirs, "ldm-kl-f4", sample_size=48)
    autoencoder = build_autoencoder(
        "diffusers", str(folder), (1, 28, 28), Adaptation(fit="resize")
    )
    assert (autoencoder.image_shape, autoencoder.latent_shape) == ((1, 28, 28), (3, 12, 12))
    description = json.loads((folder / "config.json").read_text())
    del description["sample_size"]
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"has no sample_size; .* set autoencoder\.size"):
        build_autoencoder("diffusers", str(folder), (1, 28, 28), Adaptation(fit="resize"))
    sized = build_autoencoder(
        "diffusers", str(folder), (1, 28, 28), Adaptation(fit="resize", size=32)
    )
    assert sized.latent_shape == (3, 8, 8)


@needs_diffusers
def test_a_network_is_whole_and_no_larger_than_the_limit(tmp_path: Path) -> None:
    """diffusers itself leaves absent weights at random values."""
    from safetensors.torch import load_file, save_file

    folder = write_twin(tmp_path / "twin", Official("ldm-kl-f4"), "ldm-kl-f4")
    whole = json.loads((folder / "config.json").read_text())
    levels = len(whole["block_out_channels"])
    path = folder / "diffusion_pytorch_model.safetensors"
    for changes, words in (
        ({"block_out_channels": [2**20] * levels}, "the network in config.json claims"),
        ({"layers_per_block": 10**7}, "layers_per_block is 10000000"),
        ({"latent_channels": 2**40}, "latent_channels is 1099511627776"),
        ({"block_out_channels": [64] * 5000}, "expected at most 64 numbers"),
    ):
        (folder / "config.json").write_text(json.dumps(whole | changes))
        with pytest.raises(ValueError, match=words):
            ours.load_diffusers(str(folder), (32, 32))
    (folder / "config.json").write_text(json.dumps(whole))
    ours.load_diffusers(str(folder), (32, 32))
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "decoder.conv_in.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 of the weights, such as decoder\.conv_in"):
        ours.load_diffusers(str(folder), (32, 32))


@needs_diffusers
def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = write_twin(tmp_path, Official("ldm-kl-f4"), "ldm-kl-f4")
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="could not be loaded from its folder"):
        ours.load_diffusers(str(folder), (32, 32))


@needs_diffusers
def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"hub id \(is there a network\?\)") as caught:
        ours.load_diffusers("nobody/no-such-autoencoder", (32, 32))
    assert "\n" not in str(caught.value)


class _Busy(BaseHTTPRequestHandler):
    """A hub that answers 503 to everything, which its client would try again."""

    def do_HEAD(self) -> None:
        if "/resolve/" in self.path:  # the client has questions of its own
            self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_error(503)

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What a hub that cannot be had is asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield server.asked  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@needs_diffusers
def test_an_unreachable_hub_gets_one_request(busy_hub: list[str]) -> None:
    with pytest.raises(ValueError, match=r"its hub id \(is there a network\?\): .*503"):
        ours.load_diffusers("nobody/no-such-autoencoder/vae", (32, 32))
    assert busy_hub == ["/nobody/no-such-autoencoder/resolve/main/vae/config.json"]


@needs_diffusers
def test_a_cached_model_needs_no_network(
    busy_hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = tmp_path / "models--somebody--model"
    commit = 40 * "0"
    target = stored / "snapshots" / commit / "vae"
    folder = write_twin(target, Official("ldm-kl-f4"), "ldm-kl-f4")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    actual = ours.load_diffusers("somebody/model/vae", (32, 32))
    assert actual.fingerprint == ours.load_diffusers(str(folder), (32, 32)).fingerprint
    assert len(busy_hub) == 1


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'jkoflow\[diffusers\]'"):
        build_autoencoder("diffusers", "someone/something", SHAPE)


def test_a_source_that_is_neither_a_folder_nor_a_hub_id_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", sys)
    for source in ("nowhere", "./no/where", "/no/where"):
        with pytest.raises(ValueError, match="neither a folder nor a hub id"):
            ours.load_diffusers(source, (32, 32))
    with pytest.raises(ValueError, match="is null; expected a folder or a hub id"):
        build_autoencoder("diffusers", None, SHAPE)
