"""Docstrings: every public definition has one, tensors have shapes, and the words are plain."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKED = ("flows", "autoencoders", "eval", "pipeline")
FILES = sorted(path for folder in CHECKED for path in (ROOT / folder).rglob("*.py"))
#: its keys are those of earlier configurations
OLD_KEYS = ROOT / "pipeline" / "config" / "rules" / "moved.py"
BANNED = ("told", "beside", "at hand", "anew", "so many", "thereby")
#: words that a sentence may have
LONGEST = 25
#: words that a function's docstring does not begin with, because they are no verbs
NO_VERBS = (
    "a an the of what whether how where those that this as by if for from in on with see each "
    "every all one its their same new"
).split()

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

#: a dimension: B, n, *shape, C + K, m·B, features, 3, …
_SIZE = r"(?:\*?\w+(?: ?[·×+−/^] ?\w+)*|…)"
#: (B, *shape), (n,), (1, F), (outputs, inputs, …) or (…)
_SHAPE = re.compile(rf"\((?:…|{_SIZE},|{_SIZE}(?:, {_SIZE})+)\)|\bscalar\b|\b0-d\b")


def definitions(tree: ast.AST) -> Iterator[Definition]:
    """The public definitions of a module: those at its top, and those in its public classes."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition) and not node.name.startswith("_"):
            if "overload" in {ast.unparse(word) for word in node.decorator_list}:
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node)


def takes_tensors(node: Definition) -> bool:
    """Whether a function has a tensor as a parameter or a result; state dicts do not count."""
    if isinstance(node, ast.ClassDef):
        return False
    types = [argument.annotation for argument in (*node.args.args, *node.args.kwonlyargs)]
    names = [ast.unparse(type_) for type_ in [*types, node.returns] if type_]
    return any("Tensor" in name and not re.match(r"dict|Mapping", name) for name in names)


def is_property(node: Definition) -> bool:
    return any("property" in ast.unparse(word) for word in node.decorator_list)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a docstring's prose, and of the items of its sections; no formulas."""
    text = re.sub(r"\n {4,}.*[=←→▶‖].*", "\n\n", text)  # an equation on a line of its own
    text = re.sub(r"`+[^`]*`+", "x", text)
    text = re.sub(r"(?m)^ *(Args|Returns|Attributes|Yields):$", "", text)
    text = re.sub(r"(?m)^ *Raises:(\n +.*)*", "", text)  # a list
    text = re.sub(r"(?m)^Reference: .*(\n(?! *\n).*)*", "", text)
    for paragraph in re.split(r"\n\s*\n|\n(?= {4}\w+: )", text):
        yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


def mistakes(text: str) -> list[str]:
    """What a module's docstrings lack."""
    tree, errors = ast.parse(text), []
    if not ast.get_docstring(tree):
        errors.append("module: no docstring")
    for node in definitions(tree):
        docstring = ast.get_docstring(node) or ""
        if not docstring:
            errors.append(f"{node.name}: no docstring")
            continue
        if takes_tensors(node) and not _SHAPE.search(docstring):
            errors.append(f"{node.name}: no shape")
        first = docstring.split()[0].lower()
        if not isinstance(node, ast.ClassDef) and not is_property(node) and first in NO_VERBS:
            errors.append(f"{node.name}: begins with {first!r}, which is no verb")
    for node in [tree, *definitions(tree)]:
        for sentence in sentences(ast.get_docstring(node) or ""):
            if len(re.findall(r"[\w’'\-]{2,}", sentence)) > LONGEST:
                errors.append(f"{getattr(node, 'name', 'module')}: long: {sentence}")
    return errors


def banned(text: str) -> list[str]:
    """The banned words of a module's comments and strings, docstrings among them."""
    parts = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type in (tokenize.COMMENT, tokenize.STRING)
        or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
    ]
    whole = " ".join("\n".join(parts).split())
    return [word for word in BANNED if re.search(rf"\b{word}\b", whole, re.IGNORECASE)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings(path: Path) -> None:
    assert mistakes(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_words(path: Path) -> None:
    if path == OLD_KEYS:
        return
    assert banned(path.read_text()) == []


def test_the_checks_find_mistakes() -> None:
    text = (
        "class A:\n"
        '    """A thing."""\n'
        "    def f(self, z: Tensor) -> int:\n"
        '        """Count the rows, each of which is told (and so on)."""\n'
        "    def _g(self): ...\n"
        "    @property\n"
        "    def size(self) -> int:\n"
        '        """The size."""\n'
        "def h(): ...\n"
        "def of(z: Tensor) -> Tensor:\n"
        '    """The rows of z (B, *shape)."""\n'
    )
    assert mistakes(text) == [
        "module: no docstring", "f: no shape", "h: no docstring",
        "of: begins with 'the', which is no verb",
    ]  # fmt: skip
    assert banned(text) == ["told"]
    assert banned("x = 1  # a new one, at\n# hand\ny = f'made anew {x}'\n") == ["anew"]
    long = "word " * 26
    assert len(mistakes(f'"""A module. A {long}."""\n')) == 1
    assert mistakes(f'"""A module. A {long[:100]}. A {long[:100]}."""\n') == []


@pytest.mark.parametrize("shape", ["(B, *shape)", "(n,)", "(C + K, H, W)", "(…)", "a scalar"])
def test_shapes_are_known(shape: str) -> None:
    assert _SHAPE.search(f"Return the samples, {shape}.")


@pytest.mark.parametrize("remark", ["(see below)", "(a list, of rows)", "(B)", "()"])
def test_remarks_are_no_shapes(remark: str) -> None:
    assert not _SHAPE.search(f"Return the samples {remark}.")
