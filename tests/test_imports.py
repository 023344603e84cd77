"""The direction of imports: pipeline → {flows, autoencoders, eval}, and downwards in pipeline."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import DOCUMENT, LEVEL, draw

ROOT = Path(__file__).parents[1]
LEAVES = ("flows", "autoencoders", "eval")
#: packages that every other may import
SHARED = ("configs", "pipeline.integrity")
PACKAGES = (*LEAVES, "pipeline", "configs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PIPELINE = [path for path in FILES if path.is_relative_to(ROOT / "pipeline")]
#: the files that may import a library
IMPORTERS = {
    "taming": {"autoencoders/taming.py", "pipeline/autoencoder_training/adversary.py"},
    "diffusers": {"autoencoders/diffusers.py"},
    "pytorch_fid": {"eval/features/pytorch_fid.py"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, wherever in it, and whether by `from … import`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module, True


def modules(text: str, tmp_path: Path) -> list[tuple[str, bool]]:
    path = tmp_path / "some.py"
    path.write_text(text)
    return list(imports(path))


def forbidden(package: str, module: str) -> bool:
    """Whether a file of `package` may not import `module`."""
    top = module.partition(".")[0]
    shared = any(module == name or module.startswith(f"{name}.") for name in SHARED)
    return package != "pipeline" and top in PACKAGES and top != package and not shared


def package_of(module: str) -> str | None:
    """The package of `pipeline` that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipeline" and len(parts) > 1 else None


def upwards(own: str, path: Path) -> set[str]:
    """The packages of `pipeline` that a file imports although they do not lie below its own."""
    wrong = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names = [f"pipeline.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        others = {package_of(name) for name in names} - {None, own}
        wrong |= {other for other in others if LEVEL[str(other)] >= LEVEL[own]}
    return {str(other) for other in wrong}


@pytest.mark.parametrize("path", PIPELINE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_in_pipeline_point_downwards(path: Path) -> None:
    own = package_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in (None, "__init__", "zoo"):
        return
    assert not upwards(str(own), path)


def test_an_upward_or_sideways_import_is_found(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text("from pipeline import sampling\nfrom pipeline.cli.main import app\n")
    assert upwards("training", path) == {"sampling", "cli"}
    path.write_text("def f():\n    import pipeline.runs.run\n")
    assert upwards("training", path) == set() and upwards("data", path) == {"runs"}


def test_every_package_has_a_layer() -> None:
    names = {path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py") for path in PIPELINE}
    assert names - {"__init__", "zoo"} == set(LEVEL)


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_small(package: str) -> None:
    folders = {path.parent for path in FILES if path.is_relative_to(ROOT / package)}
    assert {f.name: n for f in folders if (n := len(list(f.glob("[!_]*.py")))) > 12} == {}


def test_the_document_is_current() -> None:
    assert DOCUMENT.read_text() == draw(), "run: python -m tests.architecture"


def test_no_circles() -> None:
    """No module imports itself by way of others, lazy and TYPE_CHECKING imports included."""
    name_of = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        name_of[name.removeprefix("pipeline.facade.")] = path
    arrows: dict[str, set[str]] = {}
    for name, path in name_of.items():
        arrows[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                arrows[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                arrows[name] |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        arrows[name] &= set(name_of)
    while leaves := {name for name, others in arrows.items() if not others & set(arrows)}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"circles among {sorted(arrows)}"


def test_the_reader_sees_all_imports(tmp_path: Path) -> None:
    text = "import flows.block as b\ndef f():\n    from pipeline.cli.main import main\n"
    assert modules(text, tmp_path) == [("flows.block", False), ("pipeline.cli.main", True)]
    assert forbidden("eval", "flows.block") and forbidden("flows", "pipeline")
    assert not forbidden("pipeline", "flows") and not forbidden("flows", "flows.block")


def test_all_packages_are_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("package", (*LEAVES, *SHARED))
def test_leaves_import_neither_each_other_nor_pipeline(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module, _ in imports(path)
        if path.relative_to(ROOT).parts[0] == package and forbidden(package, module)
    ]
    assert not wrong


@pytest.mark.parametrize("library", IMPORTERS)
def test_few_files_import_a_library(library: str) -> None:
    wrong = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for module, _ in imports(path)
        if module.partition(".")[0] == library
    }
    assert wrong <= IMPORTERS[library]


def test_eval_is_only_imported_by_name() -> None:

    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in FILES
        for module, by_name in imports(path)
        if module.partition(".")[0] == "eval" and not (by_name and module.startswith("eval."))
    ]
    assert not wrong
