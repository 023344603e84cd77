"""Documents: length, links, language, and commands that exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline.cli.main import app
from pipeline.config import packaged
from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import keys
from pipeline.config.load import load
from pipeline.config.schema import SECTIONS, Config
from tests.benchmarks import study_shapes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]  # fmt: skip
CONFIGURATIONS = sorted((ROOT / "configs").rglob("*.yaml"))
PROGRAM: Any = typer.main.get_command(app)
SCRIPTS = sorted((ROOT / "docs" / "reproduce").glob("*.sh"))
JOBS = sorted((ROOT / "docs" / "cluster").glob("*.sbatch"))
BANNED = ("told", "beside", "anew", "at hand", "so many")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """The text without code blocks, code spans and the targets of links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    text = re.sub(r"`[^`\n]*`", "", text)
    return _LINK.sub("]", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        anchor = plain.replace(" ", "-")
        number = 1
        while anchor in names:
            anchor = f"{plain.replace(' ', '-')}-{number}"
            number += 1
        names.add(anchor)
    return names


def banned(text: str) -> list[str]:
    return [word for word in BANNED if re.search(rf"\b{word}\b", prose(text), flags=re.I)]


def too_long(text: str) -> list[int]:
    return [
        number
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > 160 and not line.startswith("|") and not _LINK.search(line)
    ]


def run_dry(script: Path, folder: Path) -> list[list[str]]:
    """The arguments of every jkoflow command that a script gives, with nothing run."""
    calls = folder / "calls"
    for name, skipped in (("jkoflow", 0), ("torchrun", 5)):
        stub = folder / name
        stub.write_text(f'#!/bin/sh\nshift {skipped}\nprintf "%s\\n" "$@" -- >> "{calls}"\n')
        stub.chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", str(script), "DIR"], check=True, env={**os.environ, "PATH": path})
    return [call.splitlines() for call in calls.read_text().split("--\n") if call]


def code_of(path: Path) -> str:
    """The indented lines and code spans of a page."""
    text = path.read_text()
    lines = re.findall(r"^    .*$", text, flags=re.M)
    return "\n".join([*lines, *re.findall(r"`([^`\n]+)`", text)])


def commands(code: str) -> Iterator[list[str]]:
    """The jkoflow commands of a page's code, without the program's name.

    Continued lines are joined; `torchrun … -m jkoflow VERB` counts as one.
    """
    starts = r"\s*(?:jkoflow|(?:torchrun|accelerate launch)\b.* -m (?:jkoflow|pipeline)) (.*)"
    for line in code.replace("\\\n", " ").splitlines():
        if match := re.match(starts, line):
            yield shlex.split(match[1].split(" #")[0])


def mistakes(words: list[str]) -> list[str]:
    """What a command line names that does not exist."""
    command = PROGRAM
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return [f"no command {words[0]!r}"]
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, "--help")}
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [f"{command.name} has no option {word}" for word in given if word not in known]


#: schema and folder of a command's --config, where it is not a flow
KINDS = {
    "autoencoder": (AutoencoderConfig, packaged.AUTOENCODERS),
    "toy2d": (Config, packaged.TOY2D),
}


def check_configuration(words: list[str]) -> None:
    """Resolve the configuration of a command line, unless its name stands for any."""
    if "--config" not in words:
        return
    name = words[words.index("--config") + 1]
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    schema, folder = KINDS.get(words[0], (Config, packaged.FLOWS))
    if name not in ("C", "NAME", "my.yaml"):
        load(schema, name, overrides, folder)


def unknown_settings(code: str) -> list[str]:
    """The settings of `--set key=value` that are none; `section.key` stands for any."""
    unknown, known = [], {**keys(Config), **keys(AutoencoderConfig), **SECTIONS}
    for key in sorted(set(re.findall(r"--set ['\"]?([a-z_0-9.]+)=", code)) - {"section.key"}):
        if key not in known:
            unknown.append(key)
    return unknown


def test_the_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_lines_are_short(path: Path) -> None:
    assert not too_long(path.read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tables_are_narrow(path: Path) -> None:
    rules = re.findall(r"^\|[-|: ]+\|$", path.read_text(), flags=re.M)
    assert all(rule.count("|") <= 9 for rule in rules)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_words_are_plain(path: Path) -> None:
    assert not banned(path.read_text())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_resolve(path: Path) -> None:
    broken = []
    for target in _LINK.findall(path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        if not page.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(page.read_text()):
            broken.append(target)
    assert not broken


def test_no_picture_is_unused() -> None:
    shown = {
        (path.parent / target).resolve()
        for path in DOCUMENTS
        for target in _LINK.findall(path.read_text())
    }
    assert {p.name for p in (ROOT / "docs").glob("*.png")} == {
        p.name for p in shown if p.suffix == ".png"
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_sound(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_settings_of_pages_exist(path: Path) -> None:
    code = code_of(path)
    for words in commands(code):
        assert mistakes(list(words)) == []
        check_configuration(words)
    assert unknown_settings(code) == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *CONFIGURATIONS, *SCRIPTS, *JOBS], ids=name_of)
def test_torchrun_is_given_no_option_that_it_takes_for_its_own(path: Path) -> None:
    """It completes --run to --run-path, behind the module's name too; -r is the other name."""
    for line in path.read_text().replace("\\\n", " ").splitlines():
        assert not re.search(r"torchrun .*-m jkoflow .* --run\b", line)


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_commands_and_configurations_of_scripts_exist(path: Path, tmp_path: Path) -> None:
    calls = run_dry(path, tmp_path)
    assert calls
    for words in calls:
        assert mistakes(list(words)) == []
        check_configuration(words)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=name_of)
def test_commands_of_packaged_configurations_exist(path: Path) -> None:
    head = "\n".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    for words in commands(head):
        assert mistakes(list(words)) == []
        check_configuration(words)


@pytest.mark.parametrize("shape", study_shapes.SHAPES)
def test_commands_of_the_study_of_shapes_exist(shape: str, tmp_path: Path) -> None:
    calls = study_shapes.commands(shape, tmp_path, study_shapes.options_of([str(tmp_path)]))
    for words in (words for calls in calls.values() for words in calls):
        assert mistakes(list(words)) == []
        check_configuration(words)


def test_the_checks_find_mistakes() -> None:
    assert banned("It is TOLD so.") == ["told"] and not banned("`--beside` works")
    assert too_long("x" * 161) == [1] and not too_long("| " + "x" * 161)
    assert anchors("# Why it `fails`: now\n# A\n# A\n") == {"why-it-fails-now", "a", "a-1"}
    calls = list(commands("jkoflow train --run R \\\n  --oops 1  # --no\nx jkoflow y\n"))
    assert calls == [["train", "--run", "R", "--oops", "1"]]
    assert mistakes(calls[0]) == ["train has no option --oops"]
    assert mistakes(["tain"]) == ["no command 'tain'"]
    assert mistakes(["autoencoder", "train", "--config", "C"]) == []
    assert unknown_settings("--set train.lr=1 --set 'train.oops=2' --set name=x") == ["train.oops"]
