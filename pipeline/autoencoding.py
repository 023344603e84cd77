"""`jkoflow autoencoder train | evaluate`: drives the trainer, measures the result."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders import weights
from autoencoders.base import Autoencoder, to_float, to_uint8
from autoencoders.taming import TamingAutoencoder
from autoencoders.training import AutoencoderTrainer
from eval.inception import EXTRACTOR
from eval.plots import before_after
from eval.reconstruction import Reconstruction
from pipeline import commit
from pipeline.checkpoints import load_checkpoint, save_checkpoint
from pipeline.config import Config
from pipeline.config_files import differences, to_dict
from pipeline.datasets import ImageSet, load_images
from pipeline.errors import JkoflowError, UserError
from pipeline.features import FeatureMaker, chosen, fid_of, statistics_of
from pipeline.journal import Journal
from pipeline.latents import Progress, load_parts
from pipeline.runs import ENVIRONMENT, read_config, start_run, write_environment
from pipeline.seeds import Batches, generator
from pipeline.unpacked import in_any_order

WEIGHTS = "autoencoder.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_LOG_EVERY = 50
_SHOWN = 32
_PROBE = 2000
#: sections that decide the weights; a training is not continued under other values of them
_DECISIVE = ("data", "architecture", "autoencoder_training")


def train(
    config: Config, folder: Path, accelerator: Accelerator, progress: Progress, resume: bool
) -> Path:
    """Train an autoencoder on a data set.

    Args:
        config: sections data, architecture and autoencoder_training.
        folder: weights, checkpoint, log, recipe and pictures go here.
        accelerator: device and processes.
        progress: wraps the loop.
        resume: continue what is there, which must have been started with the same sections;
            without it a folder with a training is refused.

    Returns:
        The path of the finished weights.

    Raises:
        UserError: images of another shape than the architecture takes, weights to start from that
            are not there, a training there, or one of another configuration.
        JkoflowError: the training diverged.
    """
    images = load_images(config.data)
    recipe = config.autoencoder_training
    start = _start(recipe.start)
    architecture = start.config if start is not None else config.architecture
    if tuple(architecture.image_shape) != images.shape:
        named = recipe.start if start is not None else "architecture.image_shape"
        raise UserError(
            f"{named} is {tuple(architecture.image_shape)}, but {images.name} has "
            f"{images.shape}; set it to the data's"
        )
    if architecture.flavour == "gumbel" and not recipe.decoder_only:
        raise UserError(
            "gumbel autoencoders are converted, not trained here; choose architecture.flavour=kl "
            "or vq, or train a decoder alone with autoencoder_training.decoder_only=true"
        )
    trainer = AutoencoderTrainer(config.architecture, recipe, accelerator, start)
    _enter(config, folder, resume, accelerator)
    images = in_any_order(images, accelerator, progress)
    checkpoint, began, before = folder / _CHECKPOINT, time.monotonic(), 0.0
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint)
        trainer.load_state(state["trainer"])
        before = state["seconds"]
    batches = Batches(len(images), recipe.batch_size, recipe.seed, "autoencoder")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    saved = began

    def save() -> None:
        if accelerator.is_main_process:
            seconds = before + time.monotonic() - began
            save_checkpoint(checkpoint, {"trainer": trainer.state(), "seconds": seconds})

    with Journal(folder, accelerator.is_main_process) as journal:
        journal.rewind(0, trainer.done)
        todo = range(trainer.done, recipe.iterations)
        for step in progress(todo, len(todo), "autoencoder"):
            chosen = images.take(batches.indices(step, rank, ranks).numpy())
            drawn = generator(recipe.seed, "autoencoder", step, rank)
            try:
                journal.add(trainer.step(torch.from_numpy(chosen), drawn))
            except FloatingPointError as error:
                raise JkoflowError(str(error)) from error
            if trainer.done % _LOG_EVERY == 0 or trainer.done == recipe.iterations:
                journal.flush(0, trainer.done, trainer.done)
            if time.monotonic() - saved > config.train.checkpoint_seconds:
                save()
                saved = time.monotonic()
    save()
    if accelerator.is_main_process:
        _finish(config, folder, trainer, images, before + time.monotonic() - began)
    accelerator.wait_for_everyone()
    return folder / WEIGHTS


def evaluate(
    config: Config,
    n: int,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    originals: bool = True,
) -> Path:
    """Measure an autoencoder on n images of the test split (rFID as in `pipeline.features`).

    Writes autoencoder.json (rFID, PSNR, SSIM, codebook perplexity, statistics of the latents)
    and a before/after picture. PSNR is null when every reconstruction is perfect, SSIM for
    images smaller than its window of 11 x 11.

    There are two rFIDs: against the reference (`rfid`: the floor of a flow's FID), and against the
    very images that were reconstructed (`rfid_originals`: what papers on autoencoders report).

    Args:
        config: sections data, autoencoder and evaluate (for the reference).
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
    _not_another(config, folder)
    _, autoencoder = load_parts(config)
    test = load_images(config.data.of_split(config.data.test_split))
    if n > len(test):
        raise UserError(f"{test.name} ({test.split}) has {len(test)} images, fewer than {n}")
    maker = FeatureMaker(accelerator, progress)
    reference = maker.reference(config.evaluate.reference)
    measured = _reconstruct(autoencoder, test, n, folder, accelerator, progress)
    rfid = maker.reconstruction_fid(autoencoder, test, n, reference)
    label = {"n": n, "split": test.split, "extractor": EXTRACTOR}
    against = {"reference": config.evaluate.reference, **label}
    result: dict[str, Any] = {"rfid": {"value": rfid, **against}}
    if originals:
        real = maker.real_features(test, n)
        near = maker.reconstruction_fid(autoencoder, test, n, statistics_of(real))
        result["rfid_originals"] = {"value": near, **label}
        result["real_fid"] = {"value": fid_of(real, reference), **against}
    result |= {
        **measured,
        "name": config.autoencoder.name,
        "weights": config.autoencoder.weights,
        "fingerprint": autoencoder.fingerprint,
        "architecture": autoencoder.describe(),
    }
    path = folder / "autoencoder.json"
    if accelerator.is_main_process:
        commit.write_json(path, result)
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
    order, starts = chosen(images, n), range(0, n, 250)
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


def _not_another(config: Config, folder: Path) -> None:
    """Refuse to write one autoencoder's numbers beside the weights of another."""
    trained, weights_ = folder / WEIGHTS, config.autoencoder.weights
    if not trained.is_file():
        return
    if weights_ is None or Path(weights_).expanduser().resolve() != trained.resolve():
        raise UserError(
            f"{folder} holds a trained autoencoder, but autoencoder.weights is {weights_}; "
            f"measure the one there with --set autoencoder.weights={trained}, or choose another "
            "place with --out"
        )


def _start(named: str | None) -> TamingAutoencoder | None:
    """The weights that a training starts from."""
    if named is None:
        return None
    try:
        return weights.load(weights.locate(named))
    except ValueError as error:
        raise UserError(f"autoencoder_training.start: {error}") from error


def _picture(folder: Path, before: Tensor, after: Tensor) -> None:
    commit.write_with(
        folder / "before_after.png",
        lambda file: before_after(
            file, before, after, columns=8, titles=("images", "reconstructions")
        ),
    )


def _enter(config: Config, folder: Path, resume: bool, accelerator: Accelerator) -> None:
    path = folder / "config.yaml"
    there = path.is_file()
    if there and not resume:
        raise UserError(
            f"there is a training at {folder} already; continue it with --resume, or choose "
            "another place with --out"
        )
    if there:
        _require_same(read_config(folder), config, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not there:
            start_run(folder, config)
        elif not (folder / ENVIRONMENT).is_file():  # killed before it was written
            write_environment(folder)
    accelerator.wait_for_everyone()


def _require_same(old: Config, new: Config, folder: Path) -> None:
    """Refuse to continue under another configuration; also a longer one has another schedule."""
    changed = differences(old, new, _DECISIVE, ("test_split",))
    if changed:
        told = ", ".join(f"{key}={was} (now {now})" for key, (was, now) in changed.items())
        raise UserError(
            f"the training at {folder} was started with {told}; continue it as it was started, "
            "or train elsewhere with --out"
        )


def _finish(
    config: Config, folder: Path, trainer: AutoencoderTrainer, images: ImageSet, seconds: float
) -> None:
    """Commit the weights and their card, and a picture of reconstructions."""
    recipe = {
        "data": {"name": images.name, "split": images.split, "fingerprint": images.fingerprint},
        "recipe": to_dict(config.autoencoder_training),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    probe = torch.from_numpy(images.take(chosen(images, min(len(images), _PROBE))))
    finished = trainer.finished(probe)
    tensors, metadata = weights.to_tensors(finished, recipe=recipe, exact=trainer.untrained)
    commit.write_tensors(folder / WEIGHTS, tensors, metadata)
    model = weights.load(folder / WEIGHTS)
    pixels = torch.from_numpy(images.read(0, min(len(images), _SHOWN)))
    with torch.inference_mode():
        again = to_uint8(model.decode(model.encode(to_float(pixels)).sample(generator(0, "card"))))
    _picture(folder, pixels, again)
