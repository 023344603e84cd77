"""BSDS300: 8×8 grey patches of photographs, D = 63.

Steps for the photographs of the Berkeley archive, after Uria, Murray, Larochelle, "RNADE" (NeurIPS
2013), whose patches the MAF paper uses:

1. a photograph becomes grey (ITU-R 601), and a patch of 8×8 pixels is taken at a random place;
2. uniform noise from [0, 1) is added to the grey levels 0 to 255, which are divided by 256;
3. the mean of the patch is subtracted, and its last pixel is left out.

A patch is a pure function of its split and its index, so patches are made where they are read.
Nine of ten training photographs give the training patches and the tenth the validation patches.
The archive of the MAF paper has patches in an HDF5 file instead, which need h5py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.integrity.pictures import DAMAGE, open_picture
from pipeline.integrity.reason import reason_of
from pipeline.runtime.rng import generator
from pipeline.tabular.table import (
    ARCHIVE,
    SPLITS,
    Array,
    ArrayRows,
    Rows,
    Table,
    log_product,
    require_variation,
)

FILE = "BSDS300/BSDS300.hdf5"
#: patches of each split, as in the literature
COUNTS = {"train": 1_000_000, "validation": 50_000, "test": 250_000}
SIDE = 8
#: patches that share a generator
_PART = 10_000
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class PatchRows:
    """Patches of some photographs, made when they are read.

    Attributes:
        split: name of the split, part of the seed.
        photographs: grey levels (H, W), uint8.
        count: number of patches.
        scale: divisor of each coordinate, (63,).
    """

    split: str
    photographs: Sequence[npt.NDArray[np.uint8]]
    count: int
    scale: Tensor

    def __len__(self) -> int:
        """Return the number of patches."""
        return self.count

    def read(self, start: int, stop: int) -> Tensor:
        """Return the patches [start, stop), float32 (stop − start, 63)."""
        parts = []
        for part in range(start // _PART, (max(stop, start + 1) - 1) // _PART + 1):
            first = part * _PART
            patches = self._part(part)
            parts.append(patches[max(start - first, 0) : max(stop - first, 0)])
        return torch.cat(parts) / self.scale

    def _part(self, index: int) -> Tensor:
        """Make one part of the patches, float32 (_PART, 63)."""
        rng = generator("bsds300", self.split, index)
        chosen = torch.randint(len(self.photographs), (_PART,), generator=rng)
        places = torch.rand((_PART, 2), generator=rng, dtype=torch.float64).numpy()
        noise = torch.rand((_PART, SIDE, SIDE), generator=rng).numpy()
        levels = np.empty((_PART, SIDE, SIDE), np.float32)
        for row, (photograph, place) in enumerate(zip(chosen.tolist(), places, strict=True)):
            grey = self.photographs[photograph]
            top, left = (
                int(p * (size - SIDE + 1)) for p, size in zip(place, grey.shape, strict=True)
            )
            levels[row] = grey[top : top + SIDE, left : left + SIDE]
        return torch.from_numpy(centred_patches((levels + noise) / 256))


def load_bsds300(path: str | None) -> Table:
    """Load BSDS300 from `data.path`: the folder of the photographs, or the MAF paper's archive.

    The rows are divided by the deviation of each coordinate, which `Table.log_scale` undoes.

    Raises:
        UserError: the path is null or has neither, a photograph is not readable, or h5py is
            missing.
    """
    if path is None:
        raise UserError(
            "data.path is null; expected the folder of BSDS300's photographs, with train/ and "
            f"test/, or of {FILE}; set data.path, for instance to {ARCHIVE}"
        )
    place = Path(path).expanduser()
    for file in (place, place / FILE):
        if file.is_file():
            return _from_hdf5(file)
    folders = [place / split for split in ("train", "test")]
    if not all(folder.is_dir() for folder in folders):
        raise UserError(
            f"data.path is {place}, which has neither train/ and test/ with photographs nor "
            f"{FILE}; set it to a folder that has"
        )
    train, test = (read_photographs(folder) for folder in folders)
    groups = {
        "train": [grey for index, grey in enumerate(train) if index % 10 != 9],
        "validation": train[9::10] or train,
        "test": test,
    }
    ones = torch.ones(SIDE**2 - 1)
    sample = PatchRows("train", groups["train"], _PART, ones).read(0, _PART)
    scale = sample.std(dim=0)
    rows = {split: PatchRows(split, groups[split], COUNTS[split], scale) for split in SPLITS}
    note = (
        f"{COUNTS['train']:,} / {COUNTS['validation']:,} / {COUNTS['test']:,} patches at other "
        "places of the same photographs; the literature's patches cannot be had to the row"
    )
    log_scale = log_product(scale.double().numpy())
    return Table("bsds300", SIDE**2 - 1, rows, str(place), note, log_scale)


def centred_patches(patches: Array) -> npt.NDArray[np.float32]:
    """Subtract the mean of each patch (n, 8, 8) and leave out its last pixel: (n, 63)."""
    flat = patches.reshape(len(patches), -1)
    return (flat - flat.mean(axis=1, keepdims=True))[:, :-1].astype(np.float32)


def read_photographs(folder: Path) -> list[npt.NDArray[np.uint8]]:
    """Read the photographs of a folder in the order of their names: grey levels (H, W) each.

    Raises:
        UserError: there are none, or one is not readable or too small.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no photographs; expected .jpg or .png files; add them")
    photographs = []
    for file in files:
        try:
            with open_picture(file) as image:
                grey = np.asarray(image.convert("L"))
        except DAMAGE as error:
            raise UserError(f"{file} is not a readable photograph; copy it again") from error
        if min(grey.shape) < SIDE:
            raise UserError(f"{file} has {grey.shape} pixels; expected at least 8×8; remove it")
        photographs.append(grey)
    return photographs


def _from_hdf5(file: Path) -> Table:
    """Read the patches of the MAF paper's archive."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            f"{file} is HDF5, and h5py is not installed; install it, or set data.path to the "
            "folder of the photographs"
        ) from error
    try:
        with h5py.File(file, "r") as content:
            splits = {split: np.asarray(content[split], np.float32) for split in SPLITS}
    except (OSError, KeyError) as error:
        raise UserError(
            f"{file} is not the MAF paper's BSDS300 ({reason_of(error)}); expected the data sets "
            "train, validation and test; copy it again"
        ) from error
    for split, values in splits.items():
        if values.ndim != 2 or values.shape[1] != SIDE**2 - 1 or not np.isfinite(values).all():
            raise UserError(
                f"{split} in {file} has the shape {values.shape}, or NaN; expected finite (n, 63)"
                "; copy it again"
            )
    require_variation(splits["train"][:_PART])
    scale = splits["train"][:_PART].std(axis=0)
    rows: dict[str, Rows] = {split: ArrayRows(v / scale) for split, v in splits.items()}
    counts = {split: len(values) for split, values in splits.items()}
    note = "the literature's rows and split" if counts == COUNTS else f"rows: {counts}"
    log_scale = log_product(scale.astype(np.float64))
    return Table("bsds300", SIDE**2 - 1, rows, str(file), note, log_scale)
