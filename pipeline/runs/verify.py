"""Verification of a run, a cache, an asset, a shipped run, a single file or the installation.

Every file is hashed and compared with its seal. A repair takes a broken file from the package or
from its mirror. Where a command can make it again, the repair removes it and names that command,
which makes only what is missing, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.assets.catalogue import ASSETS
from pipeline.assets.fetch import broken_files, fetch_asset
from pipeline.errors import UserError
from pipeline.integrity.digests import HOME, check_file, check_shipped, sha256_file, shipped
from pipeline.runs.directory import CONFIG, RunDirectory
from pipeline.runs.manifest import FILE
from pipeline.runs.zoo import is_absent, is_shipped, locate, source_of
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.records import well_formed
from pipeline.storage.shards import MANIFEST, shard_name

#: endings of the files that are read again; any other file may lie in a run
_TRUSTED = (".safetensors", ".json", ".yaml")
_GROWING = ("log.jsonl", "tensorboard/", "wandb/")


@dataclass(frozen=True)
class Fault:
    """A broken file.

    Attributes:
        path: of the file.
        problem: damaged, missing or unknown.
        remedy: the command that makes the file again, or what else to do.
        removable: whether the remedy makes the file again once it is removed.
    """

    path: Path
    problem: str
    remedy: str
    removable: bool

    def __str__(self) -> str:
        return f"{self.path} is {self.problem}; {self.remedy}"


def verify(path: Path | str) -> list[Fault]:
    """Verify everything at a path, and return the faults.

    Args:
        path: a sealed folder, a folder of such folders, zoo:NAME, the name of an asset, or a
            file of autoencoder weights or reference statistics.

    Raises:
        UserError: nothing is there, or it has no seal.
    """
    if is_shipped(path):
        return verify_installation(source_of(str(path))) + verify(locate(path))
    if str(path) in ASSETS and not Path(path).exists():
        return _verify_asset(str(path))
    path = Path(path).expanduser()
    if path.is_file():
        return _verify_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a run, a cache or a file of weights")
    assets = [p.parent.name for p in sorted(path.glob(f"**/assets/*/{MANIFEST}"))]
    sealed = sorted(found.parent for found in path.rglob(seal.NAME))
    if not sealed and not assets:
        seal.require(path, "the folder")
    faults = [fault for name in assets if name in ASSETS for fault in _verify_asset(name)]
    return faults + [fault for folder in sealed for fault in _verify_sealed(folder)]


def verify_installation(below: Path = HOME) -> list[Fault]:
    """Verify the shipped files below a folder, without runs that are not installed."""
    faults = []
    for name in shipped():
        path = HOME / name
        if path.is_relative_to(below) and not is_absent(path):
            try:
                check_shipped(path)
            except (ValueError, OSError):
                problem = "damaged" if path.exists() else "missing"
                faults.append(Fault(path, problem, "install jkoflow again", False))
    return faults


def repair(faults: list[Fault]) -> list[str]:
    """Repair what can be repaired, and return one sentence for each fault.

    Raises:
        JkoflowError: an asset cannot be fetched.
    """
    done = []
    for fault in faults:
        source = _packaged(fault.path)
        if source is not None:
            check_shipped(source)
            atomic.write_bytes(fault.path, source.read_bytes())
            done.append(f"{fault.path} was taken from the package")
        elif fault.path.parent.parent == data_root() / "assets":
            fetch_asset(fault.path.parent.name)
            done.append(f"{fault.path} was fetched again")
        elif fault.removable:
            if (fault.path.parent / MANIFEST).is_file():  # it marks a complete store
                (fault.path.parent / MANIFEST).unlink()
            fault.path.unlink(missing_ok=True)
            done.append(f"{fault.path} was removed; {fault.remedy}")
        else:
            done.append(str(fault))
    return done


def mended(fault: Fault) -> bool:
    """Return whether a repair left nothing broken at the path of a fault."""
    if fault.removable:
        return not fault.path.exists() or fault.path.parent.parent == data_root() / "assets"
    return _packaged(fault.path) is not None


def seal_as_it_is(folder: Path) -> int:
    """Seal a folder of an earlier version; return the number of its files.

    Raises:
        UserError: the folder does not exist, or has a seal.
    """
    folder = Path(folder)
    if not folder.is_dir() or (folder / seal.NAME).is_file():
        raise UserError(f"{folder} is no folder without a seal; leave --seal out")
    stores = [p.parent for p in folder.rglob(MANIFEST) if p.parent != folder]
    for store in stores:
        if not (store / seal.NAME).is_file():
            seal_as_it_is(store)
    sums = {name: sha256_file(folder / name) for name in _files(folder)}
    atomic.write_bytes(folder / seal.NAME, seal.lines(sums))
    return len(sums)


def _files(folder: Path) -> Iterator[str]:
    """Yield the files of a sealed folder that its own seal has, by name, in order."""
    inner = [found.parent for found in folder.rglob(seal.NAME) if found.parent != folder]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = not path.name.startswith((atomic.TEMPORARY_PREFIX, seal.NAME, "."))
        if path.is_file() and ours and not name.startswith(_GROWING):
            if not any(path.is_relative_to(other) for other in inner):
                yield name


def _verify_file(path: Path) -> list[Fault]:
    try:
        check_file(path)
    except (ValueError, OSError) as error:
        return [Fault(path, "damaged", f"bring it back or make it again ({error})", False)]
    return []


def _verify_asset(name: str) -> list[Fault]:
    command = f"fetch it by `jkoflow fetch {name}`"
    return [Fault(path, "damaged", command, True) for path in broken_files(name)]


def _verify_sealed(folder: Path) -> list[Fault]:
    """Verify a folder by its seal, and the files that its manifest needs."""
    sums, present = seal.recorded(folder), set(_files(folder))
    faults = [
        _fault(folder, name, "damaged")
        for name in sorted(present & set(sums))
        if sha256_file(folder / name) not in sums[name]
    ]
    faults += [
        _fault(folder, name, "unknown to the seal")
        for name in sorted(present - set(sums))
        if name.endswith(_TRUSTED)
    ]
    broken = {fault.path for fault in faults}
    faults += [
        _fault(folder, name, "missing")
        for name in _needed(folder, broken)
        if name not in present
    ]
    return faults


def _needed(folder: Path, broken: set[Path]) -> list[str]:
    """Return the files that a folder cannot do without, as far as its manifest is whole."""
    if (folder / MANIFEST).is_file() and folder / MANIFEST not in broken:
        manifest = atomic.read_json(folder / MANIFEST, "manifest")
        with well_formed(folder / MANIFEST):
            return [shard_name(index) for index in range(len(manifest["shards"]))]
    if (folder / FILE).is_file() and folder / FILE not in broken:
        passes = RunDirectory(folder).manifest.passes
        return [CONFIG, *(row.file for entry in passes for row in entry.blocks)]
    return []


def _fault(folder: Path, name: str, problem: str) -> Fault:
    """Describe a broken file with its remedy."""
    path, run = folder / name, folder
    while not (run / CONFIG).is_file() and run.parent != run:
        run = run.parent
    is_store = name == MANIFEST or name.startswith("shard-")
    if is_store and folder.parent.name == "latents":
        return Fault(path, problem, "make it again by `jkoflow encode` with its --config", True)
    if is_store and "stages" in folder.parts:
        return Fault(path, problem, "the training that needs it makes it again", True)
    if name.startswith("checkpoints/"):
        command = RunDirectory(run).resume_command
        return Fault(path, problem, f"make it again by `{command}`", True)
    if is_store and "features" in folder.parts or name in ("metrics.json", "report.html"):
        return Fault(path, problem, f"make it again by `jkoflow evaluate --run {run}`", True)
    if name.endswith("/row.json") or name.startswith("tuning/"):
        return Fault(path, problem, "make it again by the same `jkoflow bench`", True)
    if is_store or name.endswith(".png"):
        return Fault(path, problem, f"make it again by `jkoflow generate --run {run}`", True)
    remedy = "no command makes it again; bring it back from a copy, or make this folder again"
    return Fault(path, problem, remedy, False)


def _packaged(path: Path) -> Path | None:
    """Return the shipped file that a file of a shipped run's copy was copied from."""
    root = data_root() / "zoo"
    if not path.is_relative_to(root):
        return None
    copy, *rest = path.relative_to(root).parts
    source = source_of(f"zoo:{copy.rpartition('-')[0]}").joinpath(*rest)
    return source if source.is_file() else None
