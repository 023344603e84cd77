"""Evaluation of an autoencoder by its reconstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoders.base import Autoencoder, to_float, to_uint8
from eval.features.inception import EXTRACTOR
from eval.reconstruction import Reconstruction
from pipeline.autoencoder_training.train import SHOWN, WEIGHTS, write_reconstructions
from pipeline.config.data import DataConfig, EncoderConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet
from pipeline.data.latent_cache import build_encoder
from pipeline.errors import UserError
from pipeline.evaluation.features import FeatureExtractor, fid_of, statistics_of
from pipeline.evaluation.real_images import require_fid_sample, require_images, subset_indices
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.storage import atomic

_BATCH = 250


def evaluate_autoencoder(
    data: DataConfig,
    encoder: EncoderConfig,
    reference: str,
    n: int,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    originals: bool = True,
) -> Path:
    """Measure an autoencoder on n images of the test split; return the path of autoencoder.json.

    The file has rFID, PSNR, SSIM, codebook perplexity and statistics of the latents, and a picture
    of reconstructions is next to it. PSNR is null if all reconstructions are exact, and SSIM is
    null for images smaller than its window of 11 x 11.

    `rfid` is measured against the reference; it is the floor of a flow's FID. With `originals`,
    `rfid_originals` is measured against the reconstructed images, as in papers on autoencoders.

    Raises:
        UserError: n is below 2 or above the size of the split, or another autoencoder was trained
            in the folder.
    """
    require_fid_sample(n)
    _require_own_folder(encoder, folder)
    test = load_images(data.of_split(data.test_split))
    autoencoder = build_encoder(encoder, test.shape)
    require_images(test, n)
    extractor = FeatureExtractor(accelerator, progress)
    statistics = extractor.reference(reference)
    measures = _reconstruct(autoencoder, test, n, folder, accelerator, progress)
    rfid = extractor.reconstruction_fid(autoencoder, test, n, statistics)
    protocol = {"n": n, "split": test.split, "extractor": EXTRACTOR}
    reference_protocol = {"reference": reference, **protocol}
    result: dict[str, Any] = {"rfid": {"value": rfid, **reference_protocol}}
    if originals:
        real = extractor.real_features(test, n)
        rfid_originals = extractor.reconstruction_fid(autoencoder, test, n, statistics_of(real))
        result["rfid_originals"] = {"value": rfid_originals, **protocol}
        result["real_fid"] = {"value": fid_of(real, statistics), **reference_protocol}
    result |= {
        **measures,
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
    """Measure PSNR, SSIM, codebook use and latent statistics on n images; write the picture."""
    autoencoder.to(accelerator.device)  # type: ignore[attr-defined]
    measures, entries = Reconstruction(), int(getattr(autoencoder, "codebook_size", 0))
    order, starts = subset_indices(images, n), range(0, n, _BATCH)
    for start in progress(starts, len(starts), "reconstruct"):
        pixels = torch.from_numpy(images.take(order[start : start + _BATCH]))
        moments = autoencoder.encode(to_float(pixels).to(accelerator.device))
        z = moments.sample(generator(0, "reconstruct", start))
        reconstructions = to_uint8(autoencoder.decode(z)).cpu()
        codes = None
        if entries:
            codes = autoencoder.codes(z).cpu()  # type: ignore[attr-defined]
        measures.add(pixels, reconstructions, z.cpu(), codes)
        if start == 0 and accelerator.is_main_process:
            write_reconstructions(folder, pixels[:SHOWN], reconstructions[:SHOWN])
    return measures.result(entries)


def _require_own_folder(encoder: EncoderConfig, folder: Path) -> None:
    """Check that a folder does not hold the weights of another autoencoder."""
    trained, weights = folder / WEIGHTS, encoder.weights
    if not trained.is_file():
        return
    if weights is None or Path(weights).expanduser().resolve() != trained.resolve():
        raise UserError(
            f"--weights is {weights}; expected {trained}, the autoencoder trained in {folder}; "
            "choose another folder with --out"
        )
