"""Repair of the faults that `pipeline.runs.verify` finds, each by its kind.

A file is taken from the package or from a mirror, or the code of the command that made it makes it
again. Files that others are made of come first. Then the content is compared with the seal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.errors import FlowError
from pipeline.assets.catalogue import ASSETS
from pipeline.assets.fetch import install_asset
from pipeline.errors import JkoflowError
from pipeline.integrity.digests import check_shipped, sha256_file
from pipeline.repair import caches, runs, trainings
from pipeline.repair.benchmarks import remake
from pipeline.repair.tools import Tools
from pipeline.runs import verify
from pipeline.runs.verify import Fault
from pipeline.runtime.console import say
from pipeline.storage import atomic, seal
from pipeline.storage.shards.manifest import MANIFEST

#: kinds in the order of their repair
_ORDER = (
    verify.PACKAGED, verify.ASSET, verify.HOW, verify.CACHE, verify.FEATURES,
    verify.AUTOENCODER, verify.STAGE, verify.CHECKPOINT, verify.IMAGES, verify.RESULT,
    verify.BENCH, verify.INDEX, verify.KEPT,
)  # fmt: skip
#: kinds whose files hold times or memory, which are those of the repair
_TIMED = (verify.CHECKPOINT, verify.RESULT, verify.BENCH, verify.AUTOENCODER)


@dataclass(frozen=True)
class Repaired:
    """What became of a broken file.

    Attributes:
        fault: the file.
        whole: whether nothing is broken at its path now.
        sentence: says what was done, or what to do.
    """

    fault: Fault
    whole: bool
    sentence: str


def repair(faults: Sequence[Fault], tools: Tools) -> list[Repaired]:
    """Repair what can be repaired.

    Args:
        faults: of `pipeline.runs.verify`.
        tools: device and progress bars.

    Returns:
        what became of each file, in the order of the repairs.
    """
    groups: dict[tuple[str, Path], list[Fault]] = {}
    for fault in sorted(faults, key=lambda fault: _ORDER.index(fault.kind)):
        single = fault.kind in (verify.HOW, verify.RESULT, verify.CHECKPOINT, verify.KEPT)
        groups.setdefault((fault.kind, fault.path if single else _group(fault)), []).append(fault)
    return [done for group in groups.values() for done in _repair(group, tools)]


def _group(fault: Fault) -> Path:
    """Return what is repaired at once: a store, or all stages of a run."""
    if fault.kind == verify.STAGE:
        return next(path.parent for path in fault.path.parents if path.name == "stages")
    return fault.owner


def _repair(group: list[Fault], tools: Tools) -> list[Repaired]:
    """Repair broken files of one kind and one owner."""
    kind = group[0].kind
    if kind == verify.KEPT:
        return [Repaired(fault, False, str(fault)) for fault in group]
    try:
        known = _make(kind, group, tools)
    except (JkoflowError, FlowError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        return [
            Repaired(fault, False, f"{fault.path} could not be made again ({reason})")
            for fault in group
        ]
    return [_compared(fault) if known else _discarded(fault) for fault in group]


def _make(kind: str, group: list[Fault], tools: Tools) -> bool:
    """Make the files of a group again; return whether it is known how."""
    fault, paths, owner = group[0], [fault.path for fault in group], group[0].owner
    match kind:
        case verify.PACKAGED:
            for path in paths:
                _take_from_package(path)
            return True
        case verify.ASSET:
            install_asset(ASSETS[owner.name], owner.parents[1], log=say)
            return True
        case verify.INDEX:
            return False  # the next reader makes it again
        case verify.HOW:
            return runs.write_recipe_again(fault) or caches.write_recipe_again(fault.path, tools)
        case verify.CACHE:
            return caches.encode_again(owner, tools)
        case verify.AUTOENCODER:
            return trainings.finish_again(owner, paths, tools)
        case verify.STAGE:
            stages = list(dict.fromkeys(each.owner for each in group))
            trainings.push_again(_group(fault), stages, tools)
            return True
        case verify.CHECKPOINT:
            return trainings.train_again(owner, fault.path, tools)
        case verify.IMAGES:
            return runs.sample_again(owner, tools)
        case verify.FEATURES:
            return caches.extract_again(owner, tools)
        case verify.RESULT:
            return runs.result_again(fault, tools)
    say(f"training and measuring broken rows of {owner} again")
    return remake(owner, paths, tools.accelerator, tools.progress)


def _take_from_package(path: Path) -> None:
    """Write a file of a shipped run's copy as the package has it."""
    source = verify.packaged(path)
    assert source is not None
    check_shipped(source)
    atomic.write_bytes(path, source.read_bytes())


def _compared(fault: Fault) -> Repaired:
    """Compare a file that was made again with what its seal held before."""
    path, kind = fault.path, fault.kind
    if kind != verify.ASSET and path.is_file() and not seal.is_whole(path):
        path.unlink()
        return Repaired(fault, True, f"{path} was removed; nothing that its seal knows made it")
    if not path.is_file():
        return Repaired(fault, False, f"{path} was not made again; {fault.remedy}")
    if kind == verify.PACKAGED:
        how = "was taken from the package"
    elif kind == verify.ASSET:
        how = "was fetched again"
    elif sha256_file(path) in fault.expected:
        how = "was made again, with the same bytes"
    elif kind in _TIMED:
        how = "was made again; times and memory in it are those of the repair"
    else:
        how = (
            "was made again, with other bytes than before, as on another device or by another "
            "version of PyTorch"
        )
    return Repaired(fault, True, f"{path} {how}")


def _discarded(fault: Fault) -> Repaired:
    """Remove a file that a command makes again, but nothing here knows with which options."""
    if fault.path.name.startswith("shard-"):
        (fault.path.parent / MANIFEST).unlink(missing_ok=True)  # it marks a complete store
    fault.path.unlink(missing_ok=True)
    return Repaired(fault, True, f"{fault.path} was removed; {fault.remedy}")
