"""The wheel contains every file of the packages."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("autoencoders", "configs", "eval", "flows", "pipeline")
#: the folder of the package `jkoflow`
FACADE = "pipeline/facade/jkoflow"


def test_every_data_file_is_package_data() -> None:
    packaged: set[Path] = set()
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folders = [ROOT.joinpath(*package.split("."))] if package != "*" else []
        if package == "*":
            folders = [path.parent for top in PACKAGES for path in (ROOT / top).rglob("*.py")]
        packaged |= {path for folder in folders for p in patterns for path in folder.glob(p)}
    data = {
        path
        for top in PACKAGES
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data - packaged == set()


def test_every_module_is_in_a_package() -> None:
    folders = {path.parent for top in PACKAGES for path in (ROOT / top).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_package_is_typed() -> None:
    assert all((ROOT / top / "py.typed").is_file() for top in (*PACKAGES, FACADE))
