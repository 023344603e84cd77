"""Jobs for two real processes, started by torchrun; each leaves what it saw in a file.

torchrun --nproc_per_node 2 -m tests.processes JOB FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from autoencoders.base import to_float
from autoencoders.recipe import AutoencoderTraining
from autoencoders.training import AutoencoderTrainer
from tests.autoencoders.models import blobs, config

ROOT = Path(__file__).parents[1]
RANKS = 2


def run_job(job: str, folder: Path) -> list[Any]:
    """Run a job on two processes; what each of them saw, by rank."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(RANKS), "-m", "tests.processes", job, str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def codebook(accelerator: Accelerator, folder: Path) -> Any:
    """How a codebook starts, and the latents of this process's images that it may start on."""
    recipe = AutoencoderTraining(batch_size=8, lr=1e-12, adversarial_weight=0.0)
    made = AutoencoderTrainer(config(flavour="vq"), recipe, accelerator)
    mine = blobs(8)[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad():
        latents = made.model.encode(to_float(mine)).mean.permute(0, 2, 3, 1).reshape(-1, 2)
    made.step(mine, torch.Generator().manual_seed(accelerator.process_index))
    assert made.model.quantize is not None
    entries = made.model.quantize.embedding.weight.detach()
    return {"entries": entries.tolist(), "latents": latents.tolist()}


JOBS: dict[str, Callable[[Accelerator, Path], Any]] = {"codebook": codebook}


def main() -> None:
    job, folder = sys.argv[1], Path(sys.argv[2])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == RANKS
    seen = JOBS[job](accelerator, folder)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
