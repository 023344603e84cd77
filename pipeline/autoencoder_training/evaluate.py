"""Measures the reconstructions of an autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoders.adapt import Adaptation
from autoencoders.base import Autoencoder, to_float, to_uint8
from autoencoders.registry import build_autoencoder
from eval.inception import EXTRACTOR
from eval.reconstruction import Reconstruction
from pipeline.autoencoder_training.train import _SHOWN, WEIGHTS, _picture
from pipeline.config.schema import DataConfig, EncoderConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, fid_of, statistics_of
from pipeline.evaluation.real_images import subset_indices
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.storage import atomic


def evaluate(
    data: DataConfig,
    encoder: EncoderConfig,
    reference: str,
    n: int,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    originals: bool = True,
) -> Path:
    """Measure an autoencoder on n images of the test split.

    Writes autoencoder.json (rFID, PSNR, SSIM, codebook perplexity, statistics of the latents)
    and a before/after picture. PSNR is null when every reconstruction is perfect, SSIM for
    images smaller than its window of 11 x 11.

    There are two rFIDs: against the reference (`rfid`: the floor of a flow's FID), and against the
    very images that were reconstructed (`rfid_originals`: what papers on autoencoders report).

    Args:
        data: images; those of the test split are measured.
        encoder: the autoencoder.
        reference: shipped statistics, a .npz, a .safetensors or a folder.
        n: images.
        folder: where the results go.
        accelerator: device and processes.
        progress: wraps loops.
        originals: whether to measure rfid_originals and, of the images themselves, `real_fid`;
            their features are kept, for other autoencoders.

    Returns:
        The path of autoencoder.json.

    Raises:
        UserError: n below 2 or above the size of the split, or a folder in which another
            autoencoder was trained.
    """
    if n < 2:
        raise UserError(f"an evaluation needs at least 2 images, not {n}")
    _not_another(encoder, folder)
    test = load_images(data.of_split(data.test_split))
    adaptation = Adaptation(encoder.fit, encoder.size, encoder.latents)
    autoencoder = build_autoencoder(encoder.name, encoder.weights, test.shape, adaptation)
    if n > len(test):
        raise UserError(f"{test.name} ({test.split}) has {len(test)} images, fewer than {n}")
    maker = FeatureExtractor(accelerator, progress)
    statistics = maker.reference(reference)
    measured = _reconstruct(autoencoder, test, n, folder, accelerator, progress)
    rfid = maker.reconstruction_fid(autoencoder, test, n, statistics)
    label = {"n": n, "split": test.split, "extractor": EXTRACTOR}
    against = {"reference": reference, **label}
    result: dict[str, Any] = {"rfid": {"value": rfid, **against}}
    if originals:
        real = maker.real_features(test, n)
        near = maker.reconstruction_fid(autoencoder, test, n, statistics_of(real))
        result["rfid_originals"] = {"value": near, **label}
        result["real_fid"] = {"value": fid_of(real, statistics), **against}
    result |= {
        **measured,
        "name": encoder.name,
        "weights": encoder.weights,
        "fingerprint": autoencoder.fingerprint,
        "architecture": autoencoder.describe(),
    }
    path = folder / "autoencoder.json"
    if accelerator.is_main_process:
        atomic.write_json(path, result)
    return path


@torch.inference_mode()
def _reconstruct(
    autoencoder: Autoencoder,
    images: ImageSet,
    n: int,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Any]:
    """PSNR, SSIM, codebook use and latent statistics over n images; writes the picture."""
    autoencoder.to(accelerator.device)  # type: ignore[attr-defined]
    total, entries = Reconstruction(), int(getattr(autoencoder, "codebook_size", 0))
    order, starts = subset_indices(images, n), range(0, n, 250)
    for start in progress(starts, len(starts), "reconstruct"):
        pixels = torch.from_numpy(images.take(order[start : start + 250]))
        moments = autoencoder.encode(to_float(pixels).to(accelerator.device))
        z = moments.sample(generator(0, "reconstruct", start))
        again = to_uint8(autoencoder.decode(z)).cpu()
        codes = None
        if entries:
            codes = autoencoder.codes(z).cpu()  # type: ignore[attr-defined]
        total.add(pixels, again, z.cpu(), codes)
        if start == 0 and accelerator.is_main_process:
            _picture(folder, pixels[:_SHOWN], again[:_SHOWN])
    return total.result(entries)


def _not_another(encoder: EncoderConfig, folder: Path) -> None:
    """Refuse to write one autoencoder's numbers beside the weights of another."""
    trained, weights_ = folder / WEIGHTS, encoder.weights
    if not trained.is_file():
        return
    if weights_ is None or Path(weights_).expanduser().resolve() != trained.resolve():
        raise UserError(
            f"{folder} holds a trained autoencoder, but --weights is {weights_}; measure the one "
            f"there with --weights {trained}, or choose another place with --out"
        )
