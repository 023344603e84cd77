"""Run directory → images: noise through the blocks backwards, un-standardised, decoded.

Images lie in a store inside the run, addressed by everything that decides them (blocks,
autoencoder, solver, n, seed), so that they are made once, resume when interrupted, and are the
same on any number of processes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from autoencoders.base import Autoencoder, to_uint8
from eval.pictures import grid, note_of, save_png
from flows.block import FIXED_METHODS, SolverConfig
from flows.condition import Condition
from flows.pieces import aligned, fits
from pipeline import commit
from pipeline.agreement import together
from pipeline.config import GenerateConfig
from pipeline.errors import UserError
from pipeline.guidance import Way, way_of
from pipeline.latents import Progress
from pipeline.resources import require_room
from pipeline.runs import Run
from pipeline.seeds import generator
from pipeline.store import StoreReader, StoreWriter, key_of, open_store

_KEEP_SMALLER_THAN = 500


def solver_of(run: Run, settings: GenerateConfig) -> SolverConfig:
    """The solver that samples: the run's `push`, with the overrides of `generate`."""
    solver = run.config.push
    if settings.method is not None:
        solver = dataclasses.replace(solver, method=settings.method)
    if settings.steps is not None:
        solver = dataclasses.replace(solver, steps=settings.steps)
    return solver


def solvers_of(run: Run, settings: GenerateConfig) -> list[SolverConfig]:
    """The solver of each block, data side first.

    Raises:
        UserError: `block_steps` has not one number a block, or the solver is adaptive.
        FlowError: steps below 1, or an unknown method.
    """
    solver, counts = solver_of(run, settings), settings.block_steps
    if counts is None:
        return [solver] * len(run.flow)
    if len(counts) != len(run.flow):
        raise UserError(
            f"steps for each block need one number a block, {len(run.flow)} for this run, not "
            f"{len(counts)}"
        )
    if solver.adaptive:
        raise UserError(
            f"steps for each block need a fixed-step solver, not {solver.method}; choose --method "
            "rk4, midpoint or euler"
        )
    return [dataclasses.replace(solver, steps=count) for count in counts]


def plain_solvers(solvers: list[SolverConfig]) -> list[dict[str, Any]]:
    """Method and steps, or tolerances, of each block's solver; one for all where they agree."""
    rows = [
        {"method": each.method}
        | ({"rtol": each.rtol, "atol": each.atol} if each.adaptive else {"steps": each.steps})
        for each in solvers
    ]
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def with_solver(
    settings: GenerateConfig, steps: str | None = None, method: str | None = None
) -> GenerateConfig:
    """The settings with what `--steps` and `--method` say; None leaves either as it is.

    Args:
        settings: of the run.
        steps: one number for all blocks, or one a block separated by commas.
        method: a solver.

    Raises:
        UserError: steps are not whole numbers.
    """
    if method is not None:
        settings = dataclasses.replace(settings, method=method)
    if steps is None:
        return settings
    counts = whole_numbers("--steps", steps)
    if len(counts) == 1:
        return dataclasses.replace(settings, steps=counts[0], block_steps=None)
    return dataclasses.replace(settings, steps=None, block_steps=counts)


def whole_numbers(name: str, text: str) -> list[int]:
    """Numbers of at least 1 separated by commas.

    Raises:
        UserError: something else.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{name} takes a whole number of at least 1, or several separated by commas, not "
            f"{text!r}"
        )
    return [int(part) for part in parts]


def within(run: Run, settings: GenerateConfig, nfe: int) -> GenerateConfig:
    """The settings with as many sub-intervals a block as a budget of evaluations allows.

    Raises:
        UserError: the budget does not reach one step a network, or the solver is adaptive.
    """
    solver = solver_of(run, settings)
    if solver.adaptive:
        raise UserError(
            f"--nfe needs a fixed-step solver, but generate.method is {solver.method}; choose "
            "--method rk4, midpoint or euler"
        )
    way = way_of(run, settings)
    twice = way.evaluations  # guidance evaluates a network twice
    refined = 0 if way.refiner is None else way.refiner.nfe()
    per_step = FIXED_METHODS[solver.method] * len(run.flow) * twice
    pieces = [block.velocity.pieces() for block in way.flow]
    for steps in range((nfe - refined) // per_step, 0, -1):
        if all(fits(each, steps) for each in pieces):  # with several networks a block, not any S
            return dataclasses.replace(settings, steps=steps, block_steps=None)
    least = max(aligned(each, 1) for each in pieces)
    place = f"{len(run.flow)} blocks" + (f" of {least} networks" if least > 1 else "")
    place += " with guidance" * (twice > 1) + " and a refiner" * (refined > 0)
    raise UserError(
        f"--nfe {nfe} is below one {solver.method} step in each of {place} "
        f"({per_step * least + refined}); ask for more, or choose --method euler"
    )


def sample_images(
    run: Run, settings: GenerateConfig, accelerator: Accelerator, progress: Progress
) -> StoreReader:
    """Generate `settings.n` images, or open those generated before.

    Args:
        run: an open run.
        settings: n, seed, batch size, solver, classes, guidance, guide and refiner.
        accelerator: device and processes; rank r makes shards r, r + P, ….
        progress: wraps the loop over batches.

    Returns:
        A store with the field `images`, uint8 (n, C, H, W); its manifest has `nfe`.

    Raises:
        UserError: n or batch size below 1, more images than the disk holds, classes that the
            run does not know, or a guide or a refiner that does not fit.
        SolveError: the flow cannot be followed.
    """
    if settings.n < 1 or settings.batch_size < 1:
        raise UserError(
            f"n and generate.batch_size must be at least 1, not {settings.n} and "
            f"{settings.batch_size}"
        )
    solvers, way = solvers_of(run, settings), way_of(run, settings)
    identity: dict[str, Any] = {
        "kind": "samples",
        "run": run.fingerprint,
        "seed": settings.seed,
        "n": settings.n,
        "batch_size": settings.batch_size,
        "solver": dataclasses.asdict(solver_of(run, settings)),
    }
    if settings.block_steps is not None:
        identity["block_steps"] = settings.block_steps
    identity |= way.describe()
    folder = run.folder / "samples" / f"images-{key_of(identity)}"
    if (folder / "manifest.json").is_file():
        return open_store(folder, "generated images", identity)
    bytes_each = math.prod(run.manifest["autoencoder"]["image_shape"])
    require_room(folder, settings.n * bytes_each, f"{settings.n} images")
    # a shard is two batches or so: an interruption loses little, and shards stay few
    size = settings.batch_size * max(1, _KEEP_SMALLER_THAN // settings.batch_size)
    writer = StoreWriter(folder, identity, settings.n, size)
    autoencoder = run.autoencoder()
    way.flow.to(accelerator.device)
    missing = writer.missing(accelerator.process_index, accelerator.num_processes)
    with together(accelerator):
        for index in progress(missing, len(missing), f"generate ({size} a step)"):
            first, last = writer.bounds(index)
            parts = []
            for start in range(first, last, settings.batch_size):
                count = min(settings.batch_size, last - start)
                place = (settings.seed, "sample", start // settings.batch_size)
                choice = way.choice
                of = None if choice is None else choice.condition(start, count, *place)
                drawn = generator(*place)
                parts.append(_sample(way, autoencoder, count, drawn, solvers, accelerator, of))
            writer.write(index, {"images": torch.cat(parts)})
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        nfe = sample_nfe(way, solvers)
        writer.finish(lambda _: {"nfe": nfe})
    accelerator.wait_for_everyone()
    return open_store(folder, "generated images", identity)


@torch.inference_mode()
def _sample(
    way: Way,
    autoencoder: Autoencoder,
    count: int,
    drawn: torch.Generator,
    solvers: list[SolverConfig],
    accelerator: Accelerator,
    condition: Condition | None = None,
) -> Tensor:
    noise = torch.randn((count, *way.flow.shape), generator=drawn).to(accelerator.device)
    z = way.run.standardisation.undo(way.flow.decode(noise, solvers, condition=condition))
    autoencoder.to(accelerator.device)  # type: ignore[attr-defined]
    decoded = autoencoder.decode(z)
    if way.refiner is not None:
        decoded = way.refiner.refine(decoded, drawn)
    return to_uint8(decoded).cpu()


def sample_nfe(way: Way, solvers: list[SolverConfig]) -> int:
    """Evaluations of a network per sample, of all blocks and the refiner (on 16 samples)."""
    noise = torch.randn((16, *way.flow.shape), generator=generator(0, "nfe"))
    device = next(way.flow.parameters()).device
    of = None if way.choice is None else way.choice.condition(0, 16, "nfe")
    moved = way.flow.transport(noise.to(device), reverse=True, solver=solvers, condition=of)
    refined = 0 if way.refiner is None else way.refiner.nfe()
    return int(moved.nfe) * way.evaluations + refined


def batches(images: StoreReader, size: int = 500) -> Iterator[Tensor]:
    """The images of a store in order, uint8 (≤ size, C, H, W) at a time."""
    for start in range(0, len(images), size):
        yield images.read("images", start, min(start + size, len(images)))


def write_grid(
    images: StoreReader, path: Path, count: int, columns: int, classes: int = 1
) -> None:
    """Write the first images of a store as one PNG grid.

    Args:
        images: the store.
        path: of the picture.
        count: images, at most.
        columns: of the grid.
        classes: that the images are of in turn; with several, each has a row of its own.
    """
    if columns < 1:
        raise UserError(f"generate.columns must be at least 1, not {columns}")
    rows = classes > 1 and len(images) >= classes
    if rows:
        columns = min(columns, len(images) // classes)
        count = classes * columns
    first = images.read("images", 0, min(count, len(images)))
    if rows:
        first = first.unflatten(0, (columns, classes)).transpose(0, 1).flatten(0, 1)
    picture = grid(first, min(columns, len(first)), scale=2 if first.shape[-1] <= 64 else 1)
    note = json.dumps(images.manifest["identity"], sort_keys=True)
    commit.write_with(path, lambda file: save_png(picture, file, note))


def shows(path: Path, run: Run) -> bool:
    """Whether a grid was drawn as a run draws now: the same blocks, solver, guide and refiner.

    Of a run with classes it shows all of them, or those that the run draws now.

    A picture that says nothing of its origin is taken for one.
    """
    note = note_of(path)
    if note is None:
        return path.is_file()
    identity = json.loads(note)
    way = way_of(run, run.config.generate)
    settings = run.config.generate
    alike = identity.get("solver") == dataclasses.asdict(solver_of(run, settings))
    alike = alike and identity.get("block_steps") == settings.block_steps
    alike = alike and identity.get("precision", "fp32") == settings.precision
    labels = identity.get("classes", {}).get("labels")
    if labels and len(set(labels)) < run.flow.classes:
        alike = alike and labels == settings.labels
    for key, other in (("guide", way.guide), ("refiner", way.refiner and way.refiner.run)):
        theirs, ours = identity.get(key), way.describe().get(key)
        if theirs and other and theirs["run"] in other.origins:
            theirs = {**theirs, "run": other.fingerprint}  # the same, before it was rounded
        alike = alike and theirs == ours
    return alike and identity.get("run") in run.origins


def write_npz(images: StoreReader, path: Path) -> None:
    """Write all images as `arr_0`, uint8 (N, H, W, C), the layout that FID tools read.

    A batch at a time goes into the archive.
    """
    count, channels, height, width = (len(images), *images.read("images", 0, 1).shape[1:])
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, channels)}

    def write(file: IO[bytes]) -> None:
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for batch in batches(images):
                member.write(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())

    commit.write_with(path, write)


def write_folder(images: StoreReader, folder: Path) -> None:
    """Write every image as its own PNG, `000000.png` and on.

    Raises:
        UserError: the folder holds other files already.
    """
    names = {f"{index:06d}.png" for index in range(len(images))}
    if folder.is_dir():
        commit.sweep(folder)  # what a killed process left
        if any(path.name not in names for path in folder.iterdir()):
            raise UserError(f"{folder} holds other files; choose an empty folder for the images")
    index = 0
    for batch in batches(images):
        for image in batch.permute(0, 2, 3, 1).numpy():
            picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
            path = folder / f"{index:06d}.png"
            commit.write_with(path, partial(picture.save, format="PNG"))
            index += 1
