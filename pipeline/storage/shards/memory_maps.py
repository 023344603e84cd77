"""Memory maps of safetensors files for samples at random places."""

from __future__ import annotations

import json
import math
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a verified safetensors file by name; nothing is read ahead.

    A system that reads ahead brings the neighbours of every sample along, up to 8 MB, though
    batches of a large store do not need them.
    """
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, shape = _TYPES[entry["dtype"]], entry["shape"]
            begin, count = 8 + size + entry["data_offsets"][0], math.prod(shape)
            tensors[name] = (
                torch.frombuffer(mapped, dtype=kind, count=count, offset=begin).view(shape)
                if count
                else torch.empty(shape, dtype=kind)
            )
    return tensors
