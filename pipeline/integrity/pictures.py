"""Opens image files of unknown origin: formats without programs, and a bounded size."""

from __future__ import annotations

import stat
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipeline.integrity.limits import require_size
from pipeline.integrity.reason import reason_of

#: formats that Pillow decodes itself; others, such as EPS, start an interpreter
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
#: errors of Pillow's decoders for damaged files
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, OverflowError,
          AttributeError, struct.error, zlib.error)  # fmt: skip
#: of an image in memory, with its copies while it is converted, in each of four threads
_BYTES_PER_PIXEL = 32


def open_picture(path: str | Path | BytesIO) -> Image.Image:
    """Open an image file or its bytes, a context manager; its pixels are not decoded yet.

    Raises:
        OSError: it is not a regular file, or not an image of one of `FORMATS`.
        ValueError: its pixels exceed the limit of `pipeline.integrity.limits`.
    """
    if not isinstance(path, BytesIO) and not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(f"{path} is not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            picture = Image.open(path, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        except (SyntaxError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise OSError(f"it is not a complete image ({reason_of(error)})") from error
    try:
        name = "an image" if isinstance(path, BytesIO) else path
        require_size(picture.width * picture.height * _BYTES_PER_PIXEL, name)
    except ValueError:
        picture.close()
        raise
    return picture
