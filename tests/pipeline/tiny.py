"""The whole chain in seconds: a folder of small pictures, a random autoencoder, tiny blocks.

Commands run in children of a fork server that has imported everything once, so that a process
can be killed and started many times without paying for the imports.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from tqdm import tqdm

from autoencoders.architecture import TamingConfig
from autoencoders.taming import TamingAutoencoder
from autoencoders.weights import to_tensors
from pipeline.cli import main
from pipeline.config.schema import SECTIONS
from pipeline.storage import atomic

SIDE = 12
ROOT = Path(__file__).parents[2]


def architecture(**changes: Any) -> TamingConfig:
    """An autoencoder of 12 x 12 grey pictures with latents (2, 3, 3)."""
    base = {
        "image_shape": (1, SIDE, SIDE), "patch": 4, "ch": 32, "ch_mult": (1,),
        "z_channels": 2, "embed_dim": 2, "n_embed": 16,
    }  # fmt: skip
    return TamingConfig(**base | changes)


def random_autoencoder(seed: int = 0, **changes: Any) -> TamingAutoencoder:
    """Random weights of a believable size; frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TamingAutoencoder(architecture(**changes))
        if model.config.flavour == "vq":
            model.quantize.embedding.weight.data.normal_()
    return model.freeze()


def write_autoencoder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """The same, stored as `jkoflow autoencoder train` stores it."""
    atomic.write_tensors(path, *to_tensors(random_autoencoder(seed, **changes)))
    return path


def pictures(n: int, seed: int, side: int = SIDE) -> np.ndarray:
    """Grey blobs, uint8 (n, side, side): every one another, none symmetric."""
    rng = np.random.default_rng(seed)
    centre, width = rng.uniform(2, side - 2, (n, 2, 1, 1)), rng.uniform(1, 3, (n, 1, 1))
    y, x = np.mgrid[:side, :side]
    squared = (y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2
    return (255 * np.exp(-squared / (2 * width**2))).astype(np.uint8)


def write_pictures(folder: Path, n: int, seed: int) -> Path:
    """The same as PNG files."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures(n, seed)):
        Image.fromarray(picture).save(folder / f"{index:03d}.png")
    return folder


@dataclass
class World:
    """A data root, a folder of pictures, an autoencoder, a configuration.

    Attributes:
        root: everything lies in it.
        settings: the configuration as nested values.
        elsewhere: the data root, when it is not in `root`.
    """

    root: Path
    settings: dict[str, Any]
    elsewhere: Path | None = None

    @property
    def home(self) -> Path:
        """The data root."""
        return self.elsewhere or self.root / "home"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this world."""
        return {"JKOFLOW_HOME": str(self.home), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}

    def config(self, name: str = "tiny", **sections: Mapping[str, Any]) -> str:
        """Write the configuration, with changes of some sections; returns its path."""
        values = {**self.settings}
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes}
        objective = values["train"].get("objective", "jko")
        for other, (_, objectives) in SECTIONS.items():
            if objective not in objectives and other not in sections:
                values.pop(other, None)
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def caches(self) -> list[Path]:
        """The latent caches."""
        return sorted(p for p in (self.home / "latents").iterdir() if p.is_dir())


def make_world(root: Path, train: int = 40, test: int = 24) -> World:
    """A fresh world; nothing is encoded or trained."""
    write_pictures(root / "pictures" / "train", train, seed=1)
    write_pictures(root / "pictures" / "test", test, seed=2)
    weights = write_autoencoder(root / "autoencoder.safetensors")
    settings: dict[str, Any] = {
        "name": "tiny",
        "data": {"name": "folder", "path": str(root / "pictures"), "size": SIDE, "mode": "L"},
        "autoencoder": {"name": "pretrained", "weights": str(weights)},
        "latents": {"shard_size": 16, "batch_size": 8, "draws": 2},
        "velocity": {"kind": "resmlp", "width": 16, "depth": 1, "time_features": 4},
        "schedule": {"max_blocks": 2, "tolerance": 1e-9},
        "jko": {"solver": {"method": "rk4", "steps": 1}},
        "sampler": {"method": "rk4", "steps": 2},
        "train": {"iterations": 6, "batch_size": 16, "log_every": 2, "warmup": 2},
        "generate": {"n": 10, "batch_size": 4},
        "evaluate": {"n": 12, "nll": 4},
    }
    return World(root, settings)


# -------------------------------------------------------------------- commands in this process


def say(capsys: Any, *arguments: str | Path) -> tuple[int, str, str]:
    """Run a command here; returns its exit code, stdout and the last line of stderr."""
    capsys.readouterr()
    code = main.main([str(word) for word in arguments])
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    return code, out, lines[-1] if lines else ""


# ---------------------------------------------------------------------- commands in a child


def python(*arguments: str | Path, env: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """Start `python -m pipeline …` as people do."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *map(str, arguments)],
        env={**os.environ, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test that runs in the background would hand its deafness to Ctrl-C on to the child
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


FORKSERVER = multiprocessing.get_context("forkserver")
# torch.optim imports dynamo when it is first used, which takes longer than a whole tiny training
FORKSERVER.set_forkserver_preload(
    [
        "tests.pipeline.tiny", "pipeline.training.train", "pipeline.sampling.generate",
        "torch._dynamo",
    ]  # fmt: skip
)


def child(
    arguments: Sequence[str | Path],
    env: Mapping[str, str],
    die_at: int | None = None,
    after: bool = True,
) -> Any:
    """A process that runs a command; start() it. Its exit code is -9 when it was killed.

    Args:
        arguments: of the command line.
        env: environment variables.
        die_at: kill it, by SIGKILL, at its commit of this number; None lets it live.
        after: after the rename that makes the file count; else before, when the temporary file
            is whole.
    """
    words = [str(word) for word in arguments]
    return FORKSERVER.Process(target=_run, args=(words, dict(env), die_at, after))


def run_child(*arguments: str | Path, env: Mapping[str, str]) -> None:
    """Run a command to its end in a child; it must succeed."""
    process = child(arguments, env)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{arguments} ended with {process.exitcode}"


def _run(words: list[str], env: dict[str, str], die_at: int | None, after: bool) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which the killed leave behind
    if die_at is not None:
        _die_at_commit(die_at, after)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main.main(words)
    sys.exit(code)


def _die_at_commit(number: int, after: bool) -> None:
    rename, count = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    atomic.os.replace = replace  # type: ignore[attr-defined]
