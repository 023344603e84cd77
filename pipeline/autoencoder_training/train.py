"""Training of an autoencoder, from a configuration to a folder with weights."""

from __future__ import annotations

import math
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders import weights
from autoencoders.base import to_float, to_uint8
from autoencoders.taming import TamingAutoencoder
from eval.plots import before_after
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.plain import to_dict
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet, with_random_access
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.real_images import subset_indices
from pipeline.runs.directory import CONFIG, ResumePolicy, RunDirectory
from pipeline.runs.open_log import open_log
from pipeline.runtime import signals
from pipeline.runtime.console import Progress, annotate, say
from pipeline.runtime.distributed import broadcast_decision
from pipeline.runtime.rng import Batches, generator
from pipeline.storage import atomic
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.trackers import require_trackers
from pipeline.storage.training_log import TrainingLog

WEIGHTS = "autoencoder.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_LOG_EVERY = 50
#: images in the picture of reconstructions
SHOWN = 32
#: images for the postprocessing
_POSTPROCESSING_IMAGES = 2000
#: upper limit of the values of their pixels, those of 2 000 images of 32×32, and fewest images
_POSTPROCESSING_PIXELS, _LEAST_IMAGES = 2000 * 3 * 32 * 32, 64


def train_autoencoder(
    config: AutoencoderConfig,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
) -> Path:
    """Train an autoencoder on a data set; return the path of its weights.

    The folder gets weights, checkpoint, log, configuration and picture. `resume` continues the
    training of the same configuration there, on the same images, which may lie elsewhere now.

    Raises:
        UserError: the images have another shape than the initial weights take, the initial weights
            do not exist, or the folder has a training that cannot be continued, such as one on
            other images.
        JkoflowError: the training diverged.
    """
    images = load_images(config.data)
    require_trackers(config.training.trackers)
    trainer = _new_trainer(config, images, accelerator)
    policy = ResumePolicy(
        resume,
        f"jkoflow autoencoder train --config {shlex.quote(str(folder / CONFIG))} --out",
        changes=("moved",),
        noun="training",
        verify=lambda: _require_known_images(folder, images),
    )
    RunDirectory.open_or_create(folder, config, policy, accelerator)
    images = with_random_access(images, accelerator, progress)
    _optimise(config, folder, trainer, images, accelerator, progress)
    if accelerator.is_main_process:
        _finish(config, folder, trainer, images)
    accelerator.wait_for_everyone()
    return folder / WEIGHTS


def _new_trainer(
    config: AutoencoderConfig, images: ImageSet, accelerator: Accelerator
) -> AutoencoderTrainer:
    """Build the trainer; weights that do not fit the images or the recipe are a UserError."""
    recipe = config.training
    start = _initial_weights(recipe.start)
    architecture = config.architecture.build(images.shape) if start is None else start.config
    if tuple(architecture.image_shape) != images.shape:
        raise UserError(
            f"the images of {images.name} have the shape {images.shape}; expected "
            f"{tuple(architecture.image_shape)}, as training.start={recipe.start} takes; choose "
            "other weights or other data"
        )
    if architecture.flavour == "gumbel" and not recipe.decoder_only:
        raise UserError(
            f"training.start={recipe.start} is of the flavour gumbel; expected kl or vq to train "
            "an encoder; set training.decoder_only=true, or choose other weights"
        )
    return AutoencoderTrainer(architecture, recipe, accelerator, start)


def _optimise(
    config: AutoencoderConfig,
    folder: Path,
    trainer: AutoencoderTrainer,
    images: ImageSet,
    accelerator: Accelerator,
    progress: Progress,
) -> None:
    """Take the optimiser steps that are left; a signal saves a checkpoint and ends them."""
    recipe = config.training
    checkpoint, began, before = folder / _CHECKPOINT, time.monotonic(), 0.0
    if checkpoint.is_file():
        state = load_checkpoint(checkpoint)
        _require_same_images(state, images)
        trainer.load_state(state["trainer"])
        before = state["seconds"]
    batches = Batches(len(images), recipe.batch_size, recipe.seed, "autoencoder")
    rank, ranks = accelerator.process_index, accelerator.num_processes
    saved = began

    def save(log: TrainingLog) -> None:
        if accelerator.is_main_process:
            seconds = before + time.monotonic() - began
            state = {"trainer": trainer.state(), "seconds": seconds, "log": log.state()}
            save_checkpoint(checkpoint, {**state, "images": images.fingerprint})

    log = open_log(folder, config, recipe.trackers, accelerator)
    with log, signals.deferred():
        log.rewind(0, trainer.done)
        if trainer.done:
            log.restore(state["log"])
        todo = range(trainer.done, recipe.iterations)
        bar, first = progress(todo, len(todo), "autoencoder"), time.monotonic()
        for step in bar:
            batch = images.take(batches.indices(step, rank, ranks).numpy())
            step_generator = generator(recipe.seed, "autoencoder", step, rank)
            try:
                log.add(trainer.step(torch.from_numpy(batch), step_generator))
            except FloatingPointError as error:
                raise JkoflowError(str(error)) from error
            seen = (step + 1 - todo.start) * recipe.batch_size
            rate = seen / max(time.monotonic() - first, 1e-9)
            annotate(bar, loss=log.mean()["reconstruction"], images_per_s=rate)
            if trainer.done % _LOG_EVERY == 0 or trainer.done == recipe.iterations:
                log.flush(0, trainer.done, trainer.done)
            halt = broadcast_decision(accelerator, signals.pending())
            if halt or time.monotonic() - saved > recipe.checkpoint_seconds:
                save(log)
                saved = time.monotonic()
            if halt:
                if accelerator.is_main_process:
                    say(f"autoencoder: saved at step {trainer.done} of {recipe.iterations}")
                signals.raise_pending()
                raise signals.Interrupted(signal.SIGTERM)  # rank 0 has the signal
        save(log)
        seconds = round(before + time.monotonic() - began, 1)
        log.write({"block": 0, "step": trainer.done, "event": "finished", "seconds": seconds})


def _require_known_images(folder: Path, images: ImageSet) -> None:
    """Raise UserError if the checkpoint of a folder, where there is one, is not of the images."""
    if (folder / _CHECKPOINT).is_file():
        _require_same_images({"images": "", **load_checkpoint(folder / _CHECKPOINT)}, images)


def _require_same_images(state: dict[str, Any], images: ImageSet) -> None:
    """Raise UserError if a checkpoint is of other images; those of earlier versions name none."""
    if state.get("images", images.fingerprint) != images.fingerprint:
        raise UserError(
            f"the images of {images.name} are not those that the training was started with; "
            "expected the same files; put them back, or train elsewhere with --out"
        )


def _initial_weights(name_or_path: str | None) -> TamingAutoencoder | None:
    """Load the weights that a training starts from; None without any."""
    if name_or_path is None:
        return None
    try:
        return weights.load_weights(weights.locate_weights(name_or_path))
    except ValueError as error:
        raise UserError(f"training.start: {error}") from error


def write_reconstructions(folder: Path, images: Tensor, reconstructions: Tensor) -> None:
    """Write before_after.png of images and reconstructions, both uint8 (B, C, H, W)."""
    atomic.write_with(
        folder / "before_after.png",
        lambda file: before_after(
            file, images, reconstructions, columns=8, titles=("images", "reconstructions")
        ),
    )


def _finish(
    config: AutoencoderConfig,
    folder: Path,
    trainer: AutoencoderTrainer,
    images: ImageSet,
) -> None:
    """Write the weights with their recipe, and a picture of reconstructions."""
    recipe = {
        "data": {"name": images.name, "split": images.split, "fingerprint": images.fingerprint},
        "recipe": to_dict(config.training),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    most = max(_LEAST_IMAGES, _POSTPROCESSING_PIXELS // math.prod(images.shape))
    subset = subset_indices(images, min(len(images), _POSTPROCESSING_IMAGES, most))
    finished = trainer.finished(torch.from_numpy(images.take(subset)))
    tensors, metadata = weights.to_tensors(finished, recipe=recipe, exact=trainer.untrained)
    atomic.write_tensors(folder / WEIGHTS, tensors, metadata)
    model = weights.load_weights(folder / WEIGHTS)
    pixels = torch.from_numpy(images.read(0, min(len(images), SHOWN)))
    with torch.inference_mode():
        z = model.encode(to_float(pixels)).sample(generator(0, "card"))
        reconstructions = to_uint8(model.decode(z))
    write_reconstructions(folder, pixels, reconstructions)
