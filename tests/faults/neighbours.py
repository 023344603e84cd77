"""The same faults in neighbours: accelerate's `save_state` killed, flipped bits in safetensors."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.neighbours"])


def _prepared() -> tuple[Accelerator, torch.nn.Module]:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(1500, 1500)
    optimizer = torch.optim.Adam(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.zeros(1, 1500)).sum().backward()
    optimizer.step()
    return accelerator, model


def _save(folder: str, seconds: float) -> None:
    """Save a state again and again, and die in the middle."""
    torch.set_num_threads(1)
    accelerator, _ = _prepared()
    accelerator.save_state(folder)
    threading.Thread(target=_die_after, args=(seconds,), daemon=True).start()
    while True:
        accelerator.save_state(folder)


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_states(count: int, seed: int) -> Iterator[bool]:
    """Kill `save_state` at random moments; yield whether the state loads afterwards."""
    rng = random.Random(seed)
    accelerator, _ = _prepared()
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            process = _CONTEXT.Process(target=_save, args=(folder, rng.uniform(0, 0.5)))
            process.start()
            process.join()
            try:
                accelerator.load_state(folder)
                yield True
            except Exception:  # noqa: BLE001 - any error is a state that does not load
                yield False


def flipped_files(count: int, seed: int) -> Iterator[bool]:
    """Flip a bit of a plain safetensors file; yield whether its reader notices."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"weight": torch.randn(64, 64), "bias": torch.randn(64)}, path)
        whole = path.read_bytes()
        for _ in range(count):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                tensors = load_file(path)
                yield set(tensors) != {"weight", "bias"}
            except (SafetensorError, ValueError):
                yield True


def lines(kills: int, flips: int, seed: int = 0) -> Iterator[str]:
    """Yield the lines of the comparison."""
    torch.set_num_threads(1)
    noticed = list(flipped_files(flips, seed))
    yield f"flipped bits in plain safetensors: {noticed.count(True)} of {flips} noticed"
    loads = list(killed_states(kills, seed))
    yield f"accelerate's save_state, killed: {loads.count(False)} of {kills} do not load"
