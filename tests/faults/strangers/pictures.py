"""Malicious pictures: sizes, chunks and frames that claim too much, programs, and no files."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tests.faults.strangers.stranger import Stranger, writer


def _encoded(kind: str, side: int = 8, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, kind, **options)
    return file.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def png(
    width: int,
    height: int,
    *chunks: bytes,
    depth: int = 8,
    colour: int = 2,
    rows: bytes | None = None,
) -> bytes:
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    data = bytes((1 + 3 * width) * height) if rows is None else rows
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", head)
        + b"".join(chunks)
        + _chunk(b"IDAT", zlib.compress(data))
        + _chunk(b"IEND", b"")
    )


def _patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def _jpeg(width: int, height: int) -> bytes:
    data = _encoded("jpeg")
    place = next(data.index(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data)
    return _patched(data, place + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))


def _tiff(tags: list[tuple[int, int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of one directory: tag, type, count and value."""
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


def pictures() -> Iterator[Stranger]:
    text = zlib.compress(bytes(64 << 20))
    big = (2**31 - 1).to_bytes(4, "big")
    sides = (
        (0, 0),
        (0, 8),
        (8, 0),
        (2**31 - 1, 1),
        (1, 2**31 - 1),
        (60_000, 60_000),
        (20_000, 20_000),
        (9_000, 9_000),
        (2**31 - 1, 2**31 - 1),
    )
    found: dict[str, bytes] = {f"{w}x{h}.png": png(w, h, rows=b"") for w, h in sides}
    bmp, gif, webp = _encoded("bmp"), _encoded("gif"), _encoded("webp", lossless=True)
    tiff = [
        (256, 4, 1, 2**31 - 1),
        (257, 4, 1, 2**31 - 1),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (278, 4, 1, 1),
        (279, 4, 1, 8),
    ]
    small = [(256, 4, 1, 8), (257, 4, 1, 8), *tiff[2:]]
    found |= {
        "text.png": png(8, 8, _chunk(b"zTXt", b"x\0\0" + text)),
        "texts.png": png(
            8,
            8,
            *[_chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(10**6))) for i in range(100)],
        ),
        "international.png": png(8, 8, _chunk(b"iTXt", b"x\0\1\0\0\0" + text)),
        "profile.png": png(8, 8, _chunk(b"iCCP", b"x\0\0" + text)),
        "rows.png": png(8, 8, rows=bytes(256 << 20)),
        "no-rows.png": png(8, 8, rows=b""),
        "length.png": _patched(png(8, 8), 8, big),
        "depth.png": png(8, 8, depth=99),
        "palette.png": png(8, 8, colour=3),
        "exif.png": png(8, 8, _chunk(b"eXIf", b"II*\0" + b"\xff" * 10**6)),
        "frames.png": png(8, 8, _chunk(b"acTL", big + big)),
        "wide.jpg": _jpeg(65_500, 65_500),
        "flat.jpg": _jpeg(0, 0),
        "long.jpg": _jpeg(1, 65_500),
        "cut.jpg": _encoded("jpeg", 500)[:700],
        "markers.jpg": _encoded("jpeg")[:2] + b"\xff\xe1\x00\x02" * 10**6,
        "tables.jpg": b"\xff\xd8" + b"\xff\xdb\x00\x43\x00" + bytes(64),
        "wide.bmp": _patched(bmp, 18, struct.pack("<ii", 2**31 - 1, 2**31 - 1)),
        "upside-down.bmp": _patched(bmp, 18, struct.pack("<ii", 8, -(2**31))),
        "flat.bmp": _patched(bmp, 18, struct.pack("<ii", 0, 0)),
        "offset.bmp": _patched(bmp, 10, b"\xff" * 4),
        "colours.bmp": _patched(bmp, 46, b"\xff\xff\xff\x7f"),
        "wide.gif": _patched(gif, 6, b"\xff\xff\xff\xff"),
        "frames.gif": _frames(3000),
        "frame.gif": gif.replace(
            b",\x00\x00\x00\x00\x08\x00\x08\x00", b",\xff\xff\xff\xff\xff\xff\xff\xff"
        ),
        "wide.tif": _tiff(tiff),
        "strips.tif": _tiff([*small[:5], (273, 4, 2**31 - 1, 8), *small[6:]]),
        "samples.tif": _tiff([*small[:6], (277, 3, 1, 65535), *small[7:]]),
        "loop.tif": b"II*\0" + struct.pack("<IH", 8, 0) + struct.pack("<I", 8),
        "text.tif": _tiff([*small, (270, 2, 2**31 - 1, 8)]),
        "big.tif": b"II+\0\x08\0\0\0" + b"\xff" * 64,
        "wide.webp": _patched(webp, 21, b"\xff\xff\xff\x0f"),
        "size.webp": _patched(webp, 4, b"\xff" * 4),
        "wide.ppm": b"P6 99999999 99999999 255\n" + bytes(100),
        "digits.ppm": b"P6 " + b"9" * 10**5 + b" 1 255\n",
        "plain.ppm": b"P3 8 8 255\n" + b"1" * 10**6,
        "comment.ppm": b"P6 #" + b"x" * 10**7,
        "flat.pgm": b"P5 0 0 255\n",
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nsystem\n%%EOF\n",
        "page.png": b"%PDF-1.4\n" + bytes(100),
        "drawing.png": b"<svg><image href='file:///etc/passwd'/></svg>",
        "icon.png": _encoded("ico", 32),
        "film.png": b"RIFF\xff\xff\xff\x7fAVI " + bytes(100),
        "table.png": b"SIMPLE  =                    T" + b" " * 2850,
        "device.png": b"",
        "pipe.png": b"",
        "endless.png": b"",
        "folder.png": b"",
    }
    special = {
        "device.png": lambda path: os.symlink("/dev/zero", path),
        "pipe.png": os.mkfifo,
        "endless.png": lambda path: os.symlink(path.name, path),
        "folder.png": os.mkdir,
    }
    for name, data in found.items():
        yield Stranger("picture", name, special.get(name, writer(data)))


def _frames(count: int) -> bytes:
    one = _encoded("gif")
    start = one.index(b",")
    return one[:start] + one[start:-1] * count + b";"
