"""Checkpoints in the layouts of taming-transformers and latent-diffusion, small and random.

The networks are taming's, put together here as the official models do, so that what
`autoencoders.conversion.official` reads can be compared with what the official code would compute.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from torch import Tensor, nn

#: name → (target, ddconfig's own, embed_dim, n_embed); widths and codebooks are made small
LAYOUTS: dict[str, tuple[str, dict[str, Any], int, int | None]] = {
    "vqgan-f16-1024": ("taming.models.vqgan.VQModel", _f16 := {
        "z_channels": 256, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}, 256, 32),
    "vqgan-f16-16384": ("taming.models.vqgan.VQModel", _f16, 256, 48),
    "gumbel-f8": ("taming.models.vqgan.GumbelVQ", {
        "z_channels": 256, "ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]}, 256, 40),
    "ldm-vq-f4": ("ldm.models.autoencoder.VQModel", {
        "z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": []}, 3, 32),
    "ldm-vq-f4-noattn": ("ldm.models.autoencoder.VQModelInterface", {
        "z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": [], "attn_type": "none"},
        3, 32),
    "ldm-vq-f8": ("ldm.models.autoencoder.VQModel", {
        "z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}, 4, 64),
    "ldm-vq-f8-n256": ("ldm.models.autoencoder.VQModel", {
        "z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}, 4, 16),
    "ldm-vq-f16": ("ldm.models.autoencoder.VQModel", {
        "z_channels": 8, "ch_mult": [1, 1, 2, 2, 4], "attn_resolutions": [16]}, 8, 64),
    "ldm-kl-f4": ("ldm.models.autoencoder.AutoencoderKL", {
        "double_z": True, "z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": []}, 3, None),
    "ldm-kl-f8": ("ldm.models.autoencoder.AutoencoderKL", {
        "double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4], "attn_resolutions": []},
        4, None),
    "ldm-kl-f16": ("ldm.models.autoencoder.AutoencoderKL", {
        "double_z": True, "z_channels": 16, "ch_mult": [1, 1, 2, 2, 4],
        "attn_resolutions": [16]}, 16, None),
    "ldm-kl-f32": ("ldm.models.autoencoder.AutoencoderKL", {
        "double_z": True, "z_channels": 64, "ch_mult": [1, 1, 2, 2, 4, 4],
        "attn_resolutions": [16, 8]}, 64, None),
}  # fmt: skip


def description(layout: str) -> dict[str, Any]:
    """The model.yaml of a layout."""
    target, own, embed_dim, n_embed = LAYOUTS[layout]
    ddconfig = {
        "double_z": False, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
        "num_res_blocks": 1, "dropout": 0.0, **own,
    }  # fmt: skip
    params: dict[str, Any] = {"embed_dim": embed_dim, "ddconfig": ddconfig, "monitor": "val/rec"}
    if n_embed is not None:
        params["n_embed"] = n_embed
    params["lossconfig"] = {"target": "torch.nn.Identity"}
    if "Gumbel" in target:
        params |= {"kl_weight": 1e-8, "temperature_scheduler_config": {"target": "x.Scheduler"}}
    return {"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}}


class Gumbel(nn.Module):
    """Parameters of the official Gumbel codebook."""

    def __init__(self, channels: int, n_embed: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, n_embed, 1)
        self.embed = nn.Embedding(n_embed, channels)


class Codebook(nn.Module):
    """Parameters of the official codebook."""

    def __init__(self, channels: int, n_embed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, channels)


class Official(nn.Module):
    """What the official model of a layout holds and computes."""

    def __init__(self, layout: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layout = layout
        params = description(layout)["model"]["params"]
        dd, z, e = params["ddconfig"], params["ddconfig"]["z_channels"], params["embed_dim"]
        with contextlib.redirect_stdout(io.StringIO()):
            self.encoder, self.decoder = Encoder(**dd), Decoder(**dd)
        if dd.get("attn_type") == "none":
            self.encoder.mid.attn_1 = self.decoder.mid.attn_1 = nn.Identity()
        double = 2 if dd["double_z"] else 1
        self.quant_conv = nn.Conv2d(double * z, double * e, 1)
        self.post_quant_conv = nn.Conv2d(e, z, 1)
        self.gumbel = "gumbel" in layout
        if not dd["double_z"]:
            self.quantize = (Gumbel if self.gumbel else Codebook)(e, params["n_embed"])
        self.loss = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.eval().requires_grad_(False)

    def prequant(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def quantised(self, h: Tensor) -> Tensor:
        """The nearest or the most likely entries, by the full table of distances or logits."""
        flat = h.permute(0, 2, 3, 1)
        if self.gumbel:
            weight = self.quantize.proj.weight[:, :, 0, 0]
            indices = (flat @ weight.T + self.quantize.proj.bias).argmax(-1)
            return self.quantize.embed.weight[indices].permute(0, 3, 1, 2).contiguous()
        entries = self.quantize.embedding.weight
        indices = (flat[..., None, :] - entries).square().sum(-1).argmin(-1)
        return entries[indices].permute(0, 3, 1, 2).contiguous()

    def image(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z)).clamp(-1, 1)


class Callback:
    """Stands for one of Lightning's classes; says when code of the file is run."""

    ran: list[str] = []

    def __setstate__(self, state: object) -> None:
        Callback.ran.append("setstate")


def state_of(model: nn.Module, nested: bool = False, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict of a checkpoint: alone, within a whole model, with averaged weights."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if averaged:  # half of each weight, so that the two cannot be mistaken for each other
        state |= {
            "model_ema." + k.replace(".", ""): v / 2
            for k, v in model.state_dict().items()
            if not k.startswith("loss.")
        }
        state |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(7)}
    if nested:
        state = {f"first_stage_model.{k}": v for k, v in state.items()}
        state["model.diffusion_model.time_embed.0.weight"] = torch.zeros(4, 4)
        state["cond_stage_model.encoder.conv_in.weight"] = torch.zeros(4, 3, 3, 3)
        state["model_ema.diffusion_modeltime_embed0weight"] = torch.zeros(4, 4)
    return state


def write_checkpoint(path: Path, state: dict[str, Tensor], form: str = "zip") -> Path:
    """A checkpoint as Lightning writes it (zip, stream), or bare safetensors."""
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        return path
    callback = Callback()
    callback.__dict__["best"] = torch.zeros(2)
    content = {
        "epoch": 3, "global_step": 10, "pytorch-lightning_version": "1.0.8",
        "callbacks": {Callback: {"best_model_score": torch.tensor(0.5), "self": callback}},
        "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.ones(3).half()}},
                              "param_groups": [{"lr": 4.5e-6, "betas": (0.5, 0.9)}]}],
        "lr_schedulers": [], "state_dict": state,
    }  # fmt: skip
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def write_yaml(path: Path, layout: str, nested: bool = False) -> Path:
    """The yaml of a layout, alone or as the first stage of a whole model."""
    content = description(layout)
    if nested:
        first = content["model"]
        whole = {"linear_start": 0.0015, "first_stage_config": first, "unet_config": {}}
        content = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion",
                             "params": whole}}  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path
