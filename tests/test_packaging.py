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
#: the second distribution, of the large shipped runs
ZOO = ROOT / "pipeline" / "zoo_distribution"
#: bytes of the wheel of jkoflow, at most
_SIZE = 60_000_000
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
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and not path.is_relative_to(ZOO)
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


def test_the_second_distribution_is_of_the_same_version() -> None:
    other = tomllib.loads((ZOO / "pyproject.toml").read_text())["project"]
    version = PROJECT["project"]["version"]
    assert other["version"] == version and other["dependencies"] == [f"jkoflow=={version}"]
    assert PROJECT["project"]["optional-dependencies"]["zoo"] == [f"jkoflow-zoo=={version}"]


def files_of(wheel: Path, below: str = "pipeline/zoo/") -> set[str]:
    """The files of a wheel below a folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if name.startswith(below)}


@pytest.mark.slow
def test_wheels_run_in_a_folder_with_packages_of_its_own(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT, ZOO], check=True)
    (wheel,), (zoo,) = tmp_path.glob("jkoflow-*.whl"), tmp_path.glob("jkoflow_zoo-*.whl")
    assert wheel.stat().st_size < _SIZE
    listed = {name for name in shipped() if name.startswith("pipeline/zoo/")}
    assert not files_of(wheel) & files_of(zoo)
    assert files_of(wheel) | files_of(zoo) == {*listed, "pipeline/zoo/__init__.py"}
    site, folder = tmp_path / "site", tmp_path / "folder"
    install = [*pip, "install", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True)
    for name in ("configs", "flows", "eval", "pipeline"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise SystemExit(9)")
    environment = {**os.environ, "PYTHONPATH": str(site), "JKOFLOW_HOME": str(tmp_path / "home")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jkoflow", *words]
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    assert run("generate", "--run", "zoo:mnist", "-n", "4", "--out", "grid.png").returncode == 0
    assert (folder / "grid.png").is_file()
    wide = ("generate", "--run", "zoo:cifar10-jko", "-n", "2", "--out", "wide.png")
    refused = run(*wide)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    assert "run: pip install 'jkoflow[zoo]'" in refused.stderr
    assert run("verify").returncode == 0
    for name in ("mnist-jko", "cifar10-jko", "imagenet32-like-wide"):
        path = f"pipeline/zoo/{name}"
        with zipfile.ZipFile(zoo) as archive:  # pip's --target replaces whole folders
            archive.extractall(site, [n for n in archive.namelist() if n.startswith(path)])
    assert run(*wide).returncode == 0 and (folder / "wide.png").is_file()
    assert run("verify").returncode == 0
