"""Files and folders that are not what a command expects, by what is wrong."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.pipeline.tiny import World


def runs_of(root: Path, run: Path) -> dict[str, str]:
    """Folders and names that are no runs, by what is wrong."""
    root.mkdir()
    bad = {"no such run": root / "none", "a file": root / "file", "empty folder": root / "empty",
           "no seal": root / "unsealed", "no blocks": root / "blocks"}  # fmt: skip
    bad["file"] = bad.pop("a file")
    bad["file"].write_text("x")
    bad["empty folder"].mkdir()
    for name in ("no seal", "no blocks"):
        shutil.copytree(run, bad[name], ignore=shutil.ignore_patterns("stages"))
    (bad["no seal"] / "SHA256SUMS").unlink()
    shutil.rmtree(bad["no blocks"] / "blocks")
    for name, content in {
        "flow.json is empty": b"", "flow.json is a list": b"[]", "flow.json is null": b"null",
        "flow.json is binary": bytes(range(256)), "flow.json is deep": b"[" * 100_000,
        "config.yaml is cut": None,
    }.items():  # fmt: skip
        bad[name] = root / name.replace(" ", "-")
        shutil.copytree(run, bad[name], ignore=shutil.ignore_patterns("stages"))
        if content is None:
            text = (bad[name] / "config.yaml").read_text()
            (bad[name] / "config.yaml").write_text(text[: text.index("\n", len(text) // 2) + 1])
        else:
            (bad[name] / "flow.json").write_bytes(content)
    names = {"no shipped run": "zoo:none", "no name of the hub": "hf://../x", "empty name": ""}
    return {name: str(path) for name, path in bad.items()} | names


def configurations(root: Path, world: World) -> dict[str, str]:
    """Files that are no configurations, by what is wrong."""
    root.mkdir()
    aliases = "\n".join(["a0: &a0 {x: 1}"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ])  # fmt: skip
    texts: dict[str, bytes] = {
        "a list": b"[1]",
        "a text": b"hello",
        "not UTF-8": b"a: \xff\xfe",
        "binary": bytes(range(256)),
        "UTF-16": "data: {}".encode("utf-16"),
        "cut": b"train: {iterations: [1, ",
        "deep": b"[" * 9000,
        "aliases": aliases.encode(),
        "unknown section": b"nope: {x: 1}",
        "no section": b"train: 3",
        "an object": b"a: !!python/object/apply:os.system ['true']",
        "numbers as keys": b"1: 2",
        "a date": b"train: {iterations: 2020-01-01}",
        "twice": b"data: &a {also: *a}",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_bytes(text)
    found = {name: str(root / f"{name}.yaml") for name in texts}
    return {**found, "no such file": str(root / "none.yaml"), "a folder": str(root),
            "no packaged name": "mnits", "empty": ""}  # fmt: skip


def pictures_of(root: Path) -> dict[str, str]:
    """Files that are no pictures, by what is wrong."""
    root.mkdir()
    (root / "text.png").write_text("no picture")
    (root / "empty.png").write_bytes(b"")
    (root / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n"
    )
    os.mkfifo(root / "pipe.png")
    whole = io.BytesIO()
    Image.new("RGB", (40, 40)).save(whole, "PNG")
    (root / "cut.png").write_bytes(whole.getvalue()[:60])
    found = {path.stem: str(path) for path in sorted(root.iterdir())}
    (root / "folder").mkdir()
    return {
        **found,
        "no such picture": str(root / "none.png"),
        "empty folder": str(root / "folder"),
    }


def sets_of(root: Path) -> dict[str, str]:
    """Files that are no sets of images and no weights, by what is wrong."""
    root.mkdir()
    np.savez(root / "no-images.npz", x=np.zeros(3))
    np.savez(root / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(root / "empty-images.npz", arr_0=np.zeros((4, 0, 0, 3), np.uint8))
    np.savez(root / "objects.npz", arr_0=np.array([{}], dtype=object))
    np.savez(root / "asymmetric.npz", mu=np.zeros(2048), sigma=np.triu(np.ones((2048, 2048))))
    np.savez(root / "encrypted.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    data = bytearray((root / "encrypted.npz").read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (root / "encrypted.npz").write_bytes(data)
    with zipfile.ZipFile(root / "texts.npz", "w") as archive:
        archive.writestr("arr_0.npy", "no array")
    for name in ("text.npz", "text.safetensors", "text.parquet", "text.arrow", "text.pkl",
                 "text.tar", "text.ckpt", "text.npy"):  # fmt: skip
        (root / name).write_text("neither tensors nor a table")
    torch.save({"x": object}, root / "class.ckpt")
    (root / "huge.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    found = {path.name: str(path) for path in sorted(root.iterdir())}
    (root / "one").mkdir()
    Image.new("RGB", (8, 8)).save(root / "one" / "a.png")
    return {**found, "no such file": str(root / "none.npz"), "one image": str(root / "one")}


def places_of(root: Path) -> list[str]:
    """Places where no file can be written."""
    root.mkdir()
    (root / "folder.png").mkdir()
    (root / "folder.png" / "x").write_text("x")
    (root / "file").write_text("x")
    os.mkfifo(root / "pipe.png")
    (root / "device.png").symlink_to("/dev/null")
    names = ("folder.png", "file/x.png", "pipe.png", "device.png", "x" * 300 + ".png")
    return [str(root / name) for name in names]
