"""The direction of the arrows: pipeline → {flows, autoencoders, eval}, and no other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("flows", "autoencoders", "eval")
PACKAGES = (*LEAVES, "pipeline", "configs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
#: packages of others that one file alone may know
ALONE = {"taming": "autoencoders/taming.py", "diffusers": "autoencoders/diffusers.py"}


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
    return package != "pipeline" and top in PACKAGES and top not in (package, "configs")


def test_the_reader_sees_all_imports(tmp_path: Path) -> None:
    text = "import flows.block as b\ndef f():\n    from pipeline.cli import main\n"
    assert modules(text, tmp_path) == [("flows.block", False), ("pipeline.cli", True)]
    assert forbidden("eval", "flows.block") and forbidden("flows", "pipeline")
    assert not forbidden("pipeline", "flows") and not forbidden("flows", "flows.block")


def test_all_packages_are_read() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("package", LEAVES)
def test_leaves_import_neither_each_other_nor_pipeline(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in FILES
        for module, _ in imports(path)
        if path.relative_to(ROOT).parts[0] == package and forbidden(package, module)
    ]
    assert not found


@pytest.mark.parametrize("library", ALONE)
def test_one_file_alone_knows(library: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for module, _ in imports(path)
        if module.partition(".")[0] == library
    }
    assert found <= {ALONE[library]}


def test_eval_is_only_imported_by_name() -> None:

    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in FILES
        for module, by_name in imports(path)
        if module.partition(".")[0] == "eval" and not (by_name and module.startswith("eval."))
    ]
    assert not found
