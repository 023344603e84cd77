"""Verification of a run, a cache, an asset, a shipped run, a single file or the installation.

Every file is hashed and compared with its seal. A fault says of what kind the broken file is, and
which command makes it again. `pipeline.repair` mends faults by their kinds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.assets.catalogue import ASSETS
from pipeline.assets.fetch import broken_files
from pipeline.errors import UserError
from pipeline.integrity.digests import HOME, check_file, check_shipped, sha256_file, shipped
from pipeline.runs.directory import CONFIG, START, RunDirectory
from pipeline.runs.manifest import FILE
from pipeline.runs.networks import FOLDER, RECORD, WEIGHTS
from pipeline.runs.verify_remote import find_broken
from pipeline.runs.zoo import is_shipped, locate, name_of, source_of
from pipeline.storage import atomic, seal
from pipeline.storage.paths import data_root
from pipeline.storage.records import read_recipe, well_formed
from pipeline.storage.remote_files import is_url
from pipeline.storage.shards.manifest import CACHE_RECIPE, MANIFEST, RECIPE, shard_name
from pipeline.storage.shards.remote import FETCH_AGAIN

#: endings of the files that are read again; any other file may lie in a run
_TRUSTED = (".safetensors", ".json", ".yaml")
#: what an export holds in addition to its blocks
_EXPORTED = ("autoencoder.safetensors", "guide", "refiner")
_GROWING = ("log.jsonl", "tensorboard/", "wandb/")


#: kinds of files that no command makes again
KEPT, PACKAGED, ASSET = "kept", "packaged", "asset"
#: kinds of files that a repair makes again
CACHE, FEATURES = "cache", "features"
STAGE, CHECKPOINT, IMAGES, RESULT = "stage", "checkpoint", "images", "result"
BENCH, AUTOENCODER, HOW, INDEX = "bench", "autoencoder", "recipe", "index"
_COPY = "no command makes it again; bring it back from a copy, or make this folder again"
#: results of `evaluate --nfe-study` and `--curve`, `likelihood` and `report --neighbours`
_MEASURED = ("nfe.json", "curve.json", "likelihood.json", "auroc.json", "neighbours.json")
#: settings of a benchmark, in its folder
_BENCH = "bench.json"


@dataclass(frozen=True)
class Fault:
    """A broken file.

    Attributes:
        path: of the file.
        problem: damaged, missing or unknown.
        remedy: the command that makes the file again, or what else to do.
        kind: of the file: one of the kinds of this module.
        owner: the run, the store or the benchmark that the file belongs to.
        expected: sha256 of the contents that its seal holds.
        address: of a file that is not on a disk; it has no path.
    """

    path: Path
    problem: str
    remedy: str
    kind: str = KEPT
    owner: Path = Path()
    expected: Sequence[str] = field(default=(), compare=False)
    address: str = ""

    def __str__(self) -> str:
        return f"{self.address or self.path} is {self.problem}; {self.remedy}"


def verify(path: Path | str) -> list[Fault]:
    """Verify everything at a path, and return the faults.

    Args:
        path: a sealed folder, a folder in one, a folder of such folders, zoo:NAME, the name of an
            asset, or a file of autoencoder weights or reference statistics. A cache may also be an
            address.

    Raises:
        UserError: nothing is there, it has no seal, or the address cannot be read.
    """
    if is_url(path):
        url = str(path).rstrip("/")
        return [
            Fault(Path(), problem, FETCH_AGAIN, address=f"{url}/{name}")
            for name, problem in find_broken(url)
        ]
    if is_shipped(path):
        whole, _, inner = str(path).partition("/")
        return verify_installation(source_of(whole) / inner) + verify(locate(path))
    if str(path) in ASSETS and not Path(path).exists():
        return _verify_asset(data_root() / "assets" / str(path))
    path = Path(path).expanduser().absolute()
    if path.is_file():
        return _verify_file(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a run, a cache or a file of weights")
    assets = [p.parent for p in sorted(path.glob(f"**/assets/*/{MANIFEST}"))]
    sealed = sorted(found.parent for found in path.rglob(seal.NAME))
    if not sealed and not assets:
        seal.require(path, "the folder")
        owner = seal.folder_of(path / FILE)
        if owner is None:
            return verify_installation(path)
        return [fault for fault in _verify_sealed(owner) if fault.path.is_relative_to(path)]
    known = (folder for folder in assets if folder.name in ASSETS)
    faults = [fault for folder in known for fault in _verify_asset(folder)]
    return faults + [fault for folder in sealed for fault in _verify_sealed(folder)]


def verify_installation(below: Path = HOME) -> list[Fault]:
    """Verify the shipped files below a folder."""
    faults = []
    for name in shipped():
        path = HOME / name
        if path.is_relative_to(below):
            try:
                check_shipped(path)
            except (ValueError, OSError):
                problem = "damaged" if path.exists() else "missing"
                faults.append(Fault(path, problem, "install jkoflow again"))
    return faults


def seal_as_it_is(folder: Path) -> int:
    """Seal a folder of an earlier version; return the number of its files.

    Raises:
        UserError: the folder does not exist, or has a seal.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected a run or a cache; check the path")
    if (folder / seal.NAME).is_file():
        raise UserError(f"{folder} has a seal; expected a folder without one; leave --seal out")
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
        return [Fault(path, "damaged", f"bring it back or make it again ({error})")]
    return []


def _verify_asset(folder: Path) -> list[Fault]:
    """Verify the folder of an asset, ROOT/assets/NAME."""
    command = f"fetch it by `jkoflow fetch {folder.name}`"
    return [
        Fault(path, "damaged" if path.exists() else "missing", command, ASSET, folder)
        for path in broken_files(folder.name, folder.parents[1])
    ]


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
    if (folder / RECORD).is_file() and folder / RECORD not in broken:
        record = atomic.read_json(folder / RECORD, "record of a network")
        with well_formed(folder / RECORD):
            return [WEIGHTS] if record.get("sha256") else []
    if (folder / FILE).is_file() and folder / FILE not in broken:
        manifest = RunDirectory(folder).manifest
        rows = [row for entry in manifest.passes for row in entry.blocks]
        means = dict.fromkeys(row.mean.file for row in rows if row.mean is not None)
        inner = [
            name
            for name in seal.recorded(folder)
            if manifest.exported is not None and name.partition("/")[0] in _EXPORTED
        ]
        return [CONFIG, *(row.file for row in rows), *means, *inner]
    return []


def _fault(folder: Path, name: str, problem: str) -> Fault:
    """Describe a broken file with its remedy."""
    path = folder / name
    kind, owner, remedy = _remedy(folder, name)
    return Fault(path, problem, remedy, kind, owner, seal.recorded(folder).get(name, ()))


def _remedy(folder: Path, name: str) -> tuple[str, Path, str]:
    """Return the kind of a broken file, what it belongs to, and its remedy."""
    path = folder / name
    if packaged(path) is not None:
        return PACKAGED, folder, "take it from the package by --repair"
    if folder == data_root() / "packed":
        return INDEX, folder, "the command that reads these images makes it again"
    bench, run = _above(folder, _BENCH), _above(folder, CONFIG)
    if bench is not None and path != bench / _BENCH:
        return BENCH, bench, "make it again by the same `jkoflow bench`"
    is_store = name == MANIFEST or name.startswith("shard-")
    if name in (RECIPE, CACHE_RECIPE) or name.endswith(f".{RECIPE}"):
        return HOW, folder, "the command that made its neighbours writes it again"
    if is_store and folder.parent.name == "latents":
        recipe, command = folder / CACHE_RECIPE, "`jkoflow encode` with its --config"
        if read_recipe(recipe) is not None:
            command = f"`jkoflow encode --config {recipe}`"
        return CACHE, folder, f"make it again by {command}"
    if is_store and run is None and folder.parent.name == "features":
        return FEATURES, folder, "the evaluation that needs it makes it again"
    if run is None:
        return KEPT, folder, _COPY
    return _remedy_in_run(run, folder, name, is_store)


def _remedy_in_run(run: Path, folder: Path, name: str, is_store: bool) -> tuple[str, Path, str]:
    """Return the same for a file of a run, or of a training of an autoencoder."""
    mend = f"make it again by `jkoflow verify {run} --repair`"
    if folder.parent == run / FOLDER:
        again = f"train it again by `{_resume(run)} --network {folder.name}`"
        return KEPT, run, f"remove {folder}, which holds one network, and {again}"
    if is_store and "stages" in folder.parts:
        return STAGE, folder, mend
    if is_store and folder.parent.name == "samples":
        command = "evaluate" if folder.name.startswith("features") else "generate"
        return IMAGES, folder, f"make it again by `jkoflow {command} --run {run}`"
    is_run = any((run / each).is_file() for each in (FILE, START))
    if not is_run and name in ("checkpoint.safetensors", "autoencoder.safetensors",
                               "before_after.png"):  # fmt: skip
        return AUTOENCODER, run, f"make it again by `{_resume(run)}`"
    if name.startswith("checkpoints/"):
        return CHECKPOINT, run, f"make it again by `{_resume(run)}`"
    stem, _, ending = name.rpartition(".")
    if (stem.startswith("metrics") and ending == "json") or name == "report.html":
        command = "report" if ending == "html" else "evaluate"
        return RESULT, run, f"make it again by `jkoflow {command} --run {run}`"
    if name in ("samples/grid.png", "samples/movement.png", "samples/metrics.json"):
        return RESULT, run, mend
    if name in _MEASURED or (name.startswith("samples/") and ending in ("png", "gif")):
        return RESULT, run, "make it again by the command that made it"
    if name.startswith("previews/"):
        return KEPT, run, "remove it; no training makes this preview again, and nothing reads it"
    if is_run and name.startswith(("blocks/", FILE, START)):
        again = f"train again by `jkoflow train --config {run / CONFIG} --run OTHER`"
        return KEPT, run, f"bring it back from a copy, or {again}"
    return KEPT, run, _COPY


def _above(folder: Path, name: str) -> Path | None:
    """Return the nearest sealed folder from this one upwards that has a file of a name."""
    for place in (folder, *folder.absolute().parents):
        if (place / name).is_file() and (place / seal.NAME).is_file():
            return place
    return None


def _resume(run: Path) -> str:
    """Return the command that resumes a training, whose environment.json may be broken."""
    try:
        return RunDirectory(run).resume_command
    except UserError:
        return f"jkoflow train --run {run} --resume"


def packaged(path: Path) -> Path | None:
    """Return the shipped file that a file of a shipped run's copy is a copy of; None for none."""
    root = data_root() / "zoo"
    if not path.is_relative_to(root):
        return None
    copy, *rest = path.relative_to(root).parts
    source = source_of(name_of(root / copy)).joinpath(*rest)
    return source if source.is_file() else None
