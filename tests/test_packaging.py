"""The wheel contains every file of the packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipeline.integrity.digests import shipped

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: bytes of the wheel, at most: the limit of the Python package index
_SIZE = 100_000_000
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


def test_the_facade_is_installed_as_jkoflow() -> None:
    toml = pytest.importorskip("setuptools.config.pyprojecttoml")
    found = toml.read_configuration(ROOT / "pyproject.toml", expand=True)["tool"]["setuptools"]
    assert "jkoflow" in found["packages"] and not any("facade" in x for x in found["packages"])
    assert Path(found["package-dir"]["jkoflow"]) == Path(FACADE)


def files_of(wheel: Path, below: str = "pipeline/zoo/") -> set[str]:
    """The files of a wheel below a folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith(below)}


@pytest.mark.slow
def test_the_wheel_runs_in_a_folder_with_packages_of_its_own(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("jkoflow-*.whl")
    assert wheel.stat().st_size < _SIZE
    listed = {name for name in shipped() if name.startswith("pipeline/zoo/")}
    assert files_of(wheel) == {*listed, "pipeline/zoo/__init__.py"}
    site, folder = tmp_path / "site", tmp_path / "folder"
    install = [*pip, "install", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True)
    for name in ("configs", "flows", "eval", "pipeline"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit(9)")
    environment = {**os.environ, "PYTHONPATH": str(site), "JKOFLOW_HOME": str(tmp_path / "home")}

    def run(*words: str) -> int:
        command = [sys.executable, "-m", "jkoflow", *words]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode

    for name in ("mnist", "cifar10-jko"):
        assert run("generate", "--run", f"zoo:{name}", "-n", "2", "--out", f"{name}.png") == 0
        assert (folder / f"{name}.png").is_file()
    assert run("verify") == 0
