"""The data root, which is the folder of assets and caches, and places where no file can be."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import platformdirs

from pipeline.errors import JkoflowError, UserError

#: errors of a name that no disk could take
_NAMES = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
#: bytes of a file's or a folder's name, at most
_LONGEST = 255


def data_root() -> Path:
    """Return the data root: `$JKOFLOW_HOME`, else the cache folder of the platform."""
    home = os.environ.get("JKOFLOW_HOME")
    return Path(home).expanduser().absolute() if home else platformdirs.user_cache_path("jkoflow")


def absolute(name: str | None) -> str | None:
    """Return the full path of a file or a folder that exists; any other name stays."""
    if name is None or not Path(name).expanduser().exists():
        return name
    return str(Path(name).expanduser().absolute())


def unwritable(path: Path, error: OSError, failed: str) -> JkoflowError:
    """Return the error of a path that a command could not write.

    It is a UserError if no disk could take the name, as below a file. `failed` says in the past
    tense what was attempted.
    """
    reason = error.strerror or str(error)
    if error.errno in _NAMES:
        return UserError(
            f"{path} could not be {failed} ({reason}); expected a short name in a folder; choose "
            "another place"
        )
    return JkoflowError(
        f"{path} could not be {failed} ({reason}); free some space or choose another folder"
    )


def require_place(path: Path | None) -> None:
    """Check that a file can have a name, before the work for its content; None is no file.

    Raises:
        UserError: a folder, a device or a pipe has it, a file stands where its folder would, or a
            part of the name is too long.
    """
    if path is None:
        return
    if any(len(os.fsencode(part)) > _LONGEST for part in path.absolute().parts):
        raise unwritable(path, OSError(errno.ENAMETOOLONG, "File name too long"), "written")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(
            f"{path} is not a regular file; expected one or none; choose another name"
        )
    above = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if not above.is_dir():
        raise unwritable(path, NotADirectoryError(errno.ENOTDIR, "Not a directory"), "written")
