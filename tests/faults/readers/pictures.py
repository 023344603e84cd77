"""Readers of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.tabular.load import load_table
from pipeline.toy2d.picture_densities import PictureDensity
from tests.faults.readers.parts import images_of, picture_of, statistics
from tests.faults.readers.reader import Reader

PICTURES = ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm")


def _checked_png(content: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, as far as they can be followed."""
    import zlib

    out, place = bytearray(content), 8
    while place + 12 <= len(out):
        end = place + 8 + int.from_bytes(out[place : place + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(out)


def picture_readers(root: Path) -> Iterator[Reader]:
    for kind in PICTURES:
        folder = root / kind
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(picture_of("png"))
        whole = picture_of(kind)
        pack = _checked_png if kind == "png" else bytes
        for what, read in (
            ("set", lambda path: statistics(path.parent)),
            ("data", lambda path: images_of("folder", path.parent, size=8)),
            ("density", PictureDensity.from_file),
        ):
            if kind == "gif" and what == "set":
                continue  # pytorch-fid reads no GIF
            yield Reader(
                f"{kind}: {what}", folder / f"b.{kind}", whole, _without_object(read), pack
            )
    train, test = root / "bsds" / "train", root / "bsds" / "test"
    for folder in (train, test):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(picture_of("jpg"))
    yield Reader(
        "photographs", train / "b.jpg", picture_of("jpg"),
        lambda path: len(load_table(DataConfig(name="bsds300", path=str(root / "bsds"))).rows),
    )  # fmt: skip


def _without_object(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def plain(path: Path) -> Any:
        value = read(path)
        return value.weights if isinstance(value, PictureDensity) else value

    return plain
