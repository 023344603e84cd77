"""Seconds of a training, which other programs of the machine do not lengthen."""

from __future__ import annotations

import time

import torch


def used_seconds(device: torch.device) -> float:
    """Return the seconds that this process has used, from an arbitrary origin.

    On a CPU they are those of its processors, all threads together. A busy machine does not change
    them. On another device they are those of the clock.
    """
    return time.process_time() if device.type == "cpu" else time.perf_counter()
