"""Packaged configuration files, found relative to this module and by no import name."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError

#: folders of packaged configurations, each of a kind
FLOWS, AUTOENCODERS, TOY2D, TABULAR = "flows", "autoencoders", "toy2d", "tabular"
FOLDERS = (FLOWS, AUTOENCODERS, TOY2D, TABULAR)
#: commands that take them
VERBS = {
    FLOWS: "jkoflow encode, train",
    AUTOENCODERS: "jkoflow autoencoder train",
    TOY2D: "jkoflow toy2d",
    TABULAR: "jkoflow bench tabular",
}
#: beginnings of sections that autoencoders alone have
_SECTIONS = ("architecture:", "training:")
ROOT = Path(__file__).resolve().parents[2] / "configs"


def available(folder: str = FLOWS) -> list[str]:
    """List the short names of the packaged configurations of a folder."""
    return sorted(path.stem for path in (ROOT / folder).glob("*.yaml"))


def find(name_or_path: str, folder: str = FLOWS) -> Path:
    """Return the file of a packaged configuration, or the path of a .yaml file.

    Args:
        name_or_path: a short name (`mnist`), a name with its folder (`toy2d/rose`), or the path of
            a .yaml file.
        folder: of packaged configurations where a short name is looked up.

    Raises:
        UserError: no such file, no such name, or a name of another folder.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"no configuration file at {path}; check the path")
        return path
    short = name_or_path.removeprefix(f"{folder}/")
    if short in available(folder):
        return ROOT / folder / f"{short}.yaml"
    last = short.rpartition("/")[2]
    others = [other for other in FOLDERS if last in available(other)]
    hint = f"; {others[0]}/{last} is for `{VERBS[others[0]]}`" if others else ""
    raise UserError(
        f"unknown configuration {name_or_path!r} in {folder}; choose one of "
        f"{', '.join(available(folder))}, or give the path of a .yaml file{hint}"
    )


def folder_of(name: str) -> str | None:
    """Return the folder of a packaged name, with or without its folder; None of another name."""
    folder, _, short = name.rpartition("/")
    folders = [folder] if folder else list(FOLDERS)
    return next((f for f in folders if f in FOLDERS and short in available(f)), None)


def kind_of(path: Path) -> str:
    """Return the kind of a file that is not packaged, by the sections of autoencoders."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return AUTOENCODERS if any(line.startswith(_SECTIONS) for line in lines) else FLOWS


def summary(name: str, folder: str) -> str:
    """Return the first sentence of the comment at the head of a packaged file."""
    lines = find(name, folder).read_text().splitlines()
    head = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    sentence, stop, _ = head.partition(". ")
    return sentence.rstrip(".") + "." if stop or sentence else ""
