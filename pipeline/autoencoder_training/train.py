"""`jkoflow autoencoder train | evaluate`: drives the trainer, measures the result."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from autoencoders import weights
from autoencoders.base import to_float, to_uint8
from autoencoders.taming import TamingAutoencoder
from eval.plots import before_after
from pipeline.autoencoder_training.trainer import AutoencoderTrainer
from pipeline.config.autoencoder_recipe import AutoencoderConfig
from pipeline.config.keys import resume_rule
from pipeline.config.load import differences, read_resolved, to_dict
from pipeline.data.datasets import load_images
from pipeline.data.image_set import ImageSet, with_random_access
from pipeline.errors import JkoflowError, UserError
from pipeline.evaluation.real_images import subset_indices
from pipeline.runs.directory import ENVIRONMENT, start_run, write_environment
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import Batches, generator
from pipeline.storage import atomic
from pipeline.storage.checkpoints import load_checkpoint, save_checkpoint
from pipeline.storage.training_log import Journal

WEIGHTS = "autoencoder.safetensors"
_CHECKPOINT = "checkpoint.safetensors"
_LOG_EVERY = 50
_SHOWN = 32
_PROBE = 2000


def train(
    config: AutoencoderConfig,
    folder: Path,
    accelerator: Accelerator,
    progress: Progress,
    resume: bool,
) -> Path:
    """Train an autoencoder on a data set.

    Args:
        config: its configuration.
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
    recipe = config.training
    start = _start(recipe.start)
    architecture = config.architecture.build(images.shape) if start is None else start.config
    if tuple(architecture.image_shape) != images.shape:
        raise UserError(
            f"training.start={recipe.start} takes images {tuple(architecture.image_shape)}, but "
            f"{images.name} has {images.shape}; choose other weights or other data"
        )
    if architecture.flavour == "gumbel" and not recipe.decoder_only:
        raise UserError(
            f"training.start={recipe.start} is a gumbel autoencoder, whose encoder is not trained "
            "here; set training.decoder_only=true, or choose other weights"
        )
    trainer = AutoencoderTrainer(architecture, recipe, accelerator, start)
    _enter(config, folder, resume, accelerator)
    images = with_random_access(images, accelerator, progress)
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
            if time.monotonic() - saved > recipe.checkpoint_seconds:
                save()
                saved = time.monotonic()
    save()
    if accelerator.is_main_process:
        _finish(config, folder, trainer, images, before + time.monotonic() - began)
    accelerator.wait_for_everyone()
    return folder / WEIGHTS


def _start(named: str | None) -> TamingAutoencoder | None:
    """The weights that a training starts from."""
    if named is None:
        return None
    try:
        return weights.load_weights(weights.locate_weights(named))
    except ValueError as error:
        raise UserError(f"training.start: {error}") from error


def _picture(folder: Path, before: Tensor, after: Tensor) -> None:
    atomic.write_with(
        folder / "before_after.png",
        lambda file: before_after(
            file, before, after, columns=8, titles=("images", "reconstructions")
        ),
    )


def _enter(
    config: AutoencoderConfig, folder: Path, resume: bool, accelerator: Accelerator
) -> None:
    path = folder / "config.yaml"
    there = path.is_file()
    if there and not resume:
        raise UserError(
            f"there is a training at {folder} already; continue it with --resume, or choose "
            "another place with --out"
        )
    if there:
        _require_same(read_resolved(AutoencoderConfig, path), config, folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if not there:
            start_run(folder, config)
        elif not (folder / ENVIRONMENT).is_file():  # killed before it was written
            write_environment(folder)
    accelerator.wait_for_everyone()


def _require_same(old: AutoencoderConfig, new: AutoencoderConfig, folder: Path) -> None:
    """Refuse to continue under another configuration; also a longer one has another schedule."""
    changed = {
        key: values
        for key, values in differences(old, new).items()
        if resume_rule(key, AutoencoderConfig) != "free"
    }
    if changed:
        told = ", ".join(f"{key}={was} (now {now})" for key, (was, now) in changed.items())
        raise UserError(
            f"the training at {folder} was started with {told}; continue it as it was started, "
            "or train elsewhere with --out"
        )


def _finish(
    config: AutoencoderConfig,
    folder: Path,
    trainer: AutoencoderTrainer,
    images: ImageSet,
    seconds: float,
) -> None:
    """Commit the weights and their card, and a picture of reconstructions."""
    recipe = {
        "data": {"name": images.name, "split": images.split, "fingerprint": images.fingerprint},
        "recipe": to_dict(config.training),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    probe = torch.from_numpy(images.take(subset_indices(images, min(len(images), _PROBE))))
    finished = trainer.finished(probe)
    tensors, metadata = weights.to_tensors(finished, recipe=recipe, exact=trainer.untrained)
    atomic.write_tensors(folder / WEIGHTS, tensors, metadata)
    model = weights.load_weights(folder / WEIGHTS)
    pixels = torch.from_numpy(images.read(0, min(len(images), _SHOWN)))
    with torch.inference_mode():
        again = to_uint8(model.decode(model.encode(to_float(pixels)).sample(generator(0, "card"))))
    _picture(folder, pixels, again)
