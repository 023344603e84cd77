"""Pictures of a finished two-dimensional run, written to its samples/ folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.pictures import animation
from eval.plots2d import density, frames, scatter, trajectories, window
from flows.flow import Flow
from flows.likelihood import log_prob
from flows.refinement import refine_blocks
from flows.solving.solver import SolverConfig
from pipeline.runs.movement_plot import plot_movement
from pipeline.runs.run import Run
from pipeline.runtime.console import Progress
from pipeline.runtime.rng import generator
from pipeline.storage import atomic

if TYPE_CHECKING:
    from pipeline.toy2d.point_source import PointSource

_DOTS = 4000
_MOVING = 1500
#: states per block in the animation
_STEPS = 4
#: solver of pictures; metrics have the tolerance 1e-5
_SOLVER = SolverConfig(method="dopri5", rtol=1e-4, atol=1e-4)


def draw_all(
    run: Run, source: PointSource, folder: Path, device: torch.device, progress: Progress
) -> None:
    """Write pictures of samples, density, trajectories (also animated) and movement of a run."""
    data = source.sample("pictures", 0, _DOTS)
    noise = torch.randn((_DOTS, 2), generator=generator(source.seed, "pictures"))
    limits = window(data)
    samples = run.flow.decode(noise.to(device), _SOLVER).cpu()
    panels = [("data", data), ("generated", samples)]
    atomic.write_with(folder / "samples.png", lambda f: scatter(f, panels, limits))
    draw_density(run.flow, source, folder / "density.png", limits, device, progress)
    draw_trajectories(run.flow, data[:_MOVING], noise[:_MOVING], folder, device)
    plot_movement(run.manifest, folder / "movement.png")


def draw_density(
    flow: Flow,
    source: PointSource,
    path: Path,
    limits: tuple[float, float],
    device: torch.device,
    progress: Progress,
) -> None:
    """Draw the model's exact density on a grid and a histogram of twenty points per cell."""
    count = source.settings.grid
    chunks = list(grid_centres(count, limits).to(device).split(2000))
    values = [
        log_prob(flow, chunk, divergence="exact", solver=_SOLVER).value.cpu()
        for chunk in progress(chunks, len(chunks), "density")
    ]
    log_density = torch.cat(values).view(count, count).numpy()
    data = source.sample("histogram", 0, 20 * count**2)
    atomic.write_with(path, lambda f: density(f, data, log_density, limits))


def draw_trajectories(
    flow: Flow, data: Tensor, noise: Tensor, folder: Path, device: torch.device
) -> None:
    """Draw trajectories of data and noise (N, 2) over the blocks, as panels and as an animation.

    States of the animation within a block are states of the ODE, not interpolations: each block is
    split into children that compose the same map.
    """
    forward = [z.cpu() for z in flow.trajectory(data.to(device), solver=_SOLVER)]
    backward = [z.cpu() for z in flow.trajectory(noise.to(device), True, _SOLVER)]
    limits = window(torch.cat([*forward, *backward]))
    panels = folder / "trajectories.png"
    atomic.write_with(panels, lambda f: trajectories(f, forward, backward, limits))
    fine = refine_blocks(flow, _STEPS).to(device)
    encoded = [z.cpu() for z in fine.trajectory(data.to(device), solver=_SOLVER)]
    decoded = [z.cpu() for z in fine.trajectory(noise.to(device), True, _SOLVER)]
    rest = 4  # frames of the noise
    states = [*encoded, *[encoded[-1]] * rest, *decoded]
    titles = ["data → noise"] * len(encoded) + ["noise"] * rest + ["noise → data"] * len(decoded)
    pictures = frames(states, limits, titles)
    path = folder / "trajectories.gif"
    atomic.write_with(path, lambda f: animation(f, pictures, seconds=0.12, hold=1.5))


def grid_centres(count: int, limits: tuple[float, float]) -> Tensor:
    """Return the cell centres of a grid, (count², 2), x fastest, lowest row first."""
    step = (limits[1] - limits[0]) / count
    axis = limits[0] + step * (torch.arange(count) + 0.5)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)
