"""Folders of images: any mode, size and arrangement."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.data.datasets import load_images
from pipeline.data.image_folder import prepare, read_pictures
from pipeline.errors import UserError
from pipeline.evaluation.real_images import at_least, held_out_images
from pipeline.storage import atomic


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))


def noise(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def config(path: Path, size: int | None = 8, **options: object) -> DataConfig:
    return DataConfig(name="folder", path=str(path), size=size, **options)


def save(folder: Path, names: list[str], size: int = 8) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise((size, size), seed).save(folder / name)


def test_images_of_the_size_keep_their_bytes_in_the_order_of_their_paths(tmp_path):
    names = ["b.png", "a/z.bmp", "a/c/d.PNG", "c.tiff", "B.webp"]
    save(tmp_path / "data", names[:-1])
    noise((8, 8), 4).save(tmp_path / "data" / "B.webp", lossless=True)
    for other in ("notes.txt", ".hidden.png", "._b.png"):
        (tmp_path / "data" / other).write_bytes(b"not an image")
    images = load_images(config(tmp_path / "data"))
    assert (len(images), images.shape, images.labels) == (5, (3, 8, 8), None)
    expected = [
        np.asarray(noise((8, 8), names.index(n))).transpose(2, 0, 1) for n in sorted(names)
    ]
    assert np.array_equal(images.read(0, 5), np.stack(expected))
    assert np.array_equal(images.take(np.array([4, 1])), np.stack([expected[4], expected[1]]))


def test_subfolders_are_classes(tmp_path):
    save(tmp_path, ["dog/1.png", "cat/b/2.png", "cat/a/1.png", "emu/1.png"])
    images = load_images(config(tmp_path))
    assert images.labels.tolist() == [0, 0, 1, 2] and images.labels.dtype == np.int64
    assert images.class_names == ("cat", "dog", "emu")
    assert load_images(config(tmp_path, limit=2)).labels.tolist() == [0, 0]
    save(tmp_path, ["stray.png"])
    assert load_images(config(tmp_path)).labels is None


def test_links_to_classes_are_classes(tmp_path):
    """A link to a parent folder alone would have no end."""
    save(tmp_path, ["cats/1.png", "dogs/1.png"])
    for name, target in (("aaa", "cats"), ("more", "cats"), ("dogs/loop", ".")):
        (tmp_path / name).symlink_to(tmp_path / target, target_is_directory=True)
    images = load_images(config(tmp_path))
    assert images.class_names == ("aaa", "cats", "dogs", "more") and len(images) == 4


def test_splits_are_subfolders(tmp_path, monkeypatch):
    save(tmp_path / "both", ["train/cat/1.png", "train/dog/1.png", "test/dog/2.png"])
    train, test = (load_images(config(tmp_path / "both", split=s)) for s in ("train", "test"))
    assert (len(train), len(test)) == (2, 1)
    assert train.labels.tolist() == [0, 1]
    save(tmp_path / "val", ["train/1.png", "val/2.png", "val/3.png"])
    assert len(load_images(config(tmp_path / "val", split="test"))) == 2
    save(tmp_path / "all", ["train/1.png", "val/2.png", "val/3.png", "test/4.png"])
    lengths = [len(load_images(config(tmp_path / "all", split=s))) for s in ("val", "test")]
    assert lengths == [2, 1]
    save(tmp_path / "plain", ["1.png"])
    plain = config(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no split 'test'; move the held-out .*test, and the"):
        load_images(plain.of_split("test"))
    # an evaluation then measures on what there is, and says so
    whole = load_images(plain)
    for images in (held_out_images(plain), at_least(plain, 1)):
        assert (images.fingerprint, images.split) == (whole.fingerprint, "train")
    # a path from home is the same folder
    monkeypatch.setenv("HOME", str(tmp_path))
    home = replace(config(tmp_path), path="~/both")
    assert held_out_images(home).split == "test"
    with pytest.raises(UserError, match=r"no split 'train'; put its images into .*train"):
        save(tmp_path / "half", ["test/1.png"])
        load_images(config(tmp_path / "half"))
    # done as told, what was trained before still fits
    (tmp_path / "plain" / "train").mkdir()
    (tmp_path / "plain" / "1.png").rename(tmp_path / "plain" / "train" / "1.png")
    assert load_images(plain).fingerprint == whole.fingerprint


def test_resizing_is_antialiased(tmp_path):
    """Against torch's antialiased bicubic, away from where the edges are treated apart."""
    picture = noise((96, 96), 3)
    ours = prepare(picture, 24, "RGB").astype(float)
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.interpolate(
        whole, (24, 24), mode="bicubic", antialias=True, align_corners=False
    )[0]
    assert np.abs(ours - theirs.clamp(0, 255).numpy()).max() <= 1.5
    # Without antialiasing a fine chessboard would stay black and white.
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(prepare(Image.fromarray(board), 8, "L").astype(int) - 128).max() < 16


@pytest.mark.parametrize("size", [(40, 20), (20, 40)])
def test_the_centre_square_is_kept(size):
    """A quarter red, a half green, a quarter blue: the centre square is the green."""
    long = np.zeros((20, 40, 3), np.uint8)
    long[:, :10, 0], long[:, 10:30, 1], long[:, 30:, 2] = 200, 200, 200
    picture = Image.fromarray(long if size == (40, 20) else long.transpose(1, 0, 2).copy())
    assert picture.size == size
    ours = prepare(picture, 10, "RGB")
    assert (ours[:, 2:-2, 2:-2] == np.array([0, 200, 0])[:, None, None]).all()
    # Exactly as the whole resized and then cropped.
    half = picture.resize((size[0] // 2, size[1] // 2), Image.Resampling.BICUBIC)
    box = (5, 0, 15, 10) if size == (40, 20) else (0, 5, 10, 15)
    assert np.array_equal(ours.transpose(1, 2, 0), np.asarray(half.crop(box)))


def test_images_are_enlarged(tmp_path):
    noise((3, 5)).save(tmp_path / "small.png")
    flat = np.full((2, 2, 3), 77, np.uint8)
    assert load_images(config(tmp_path, 16)).read(0, 1).shape == (1, 3, 16, 16)
    assert (prepare(Image.fromarray(flat), 7, "RGB") == 77).all()


def pixel(image: Image.Image, mode: str = "RGB") -> list[int]:
    return prepare(image, 1, mode)[:, 0, 0].tolist()


def test_modes_are_converted():
    assert pixel(Image.new("L", (1, 1), 90)) == [90, 90, 90]
    assert pixel(Image.new("RGB", (1, 1), (255, 0, 0)), "L") == [76]  # 0.299 of red
    assert pixel(Image.new("1", (1, 1), 1)) == [255, 255, 255]
    assert pixel(Image.new("I;16", (1, 1), 0xABCD), "L") == [0xAB]
    assert pixel(Image.new("I", (1, 1), 0xABCD), "L") == [0xAB]
    assert pixel(Image.new("CMYK", (1, 1), (0, 255, 255, 0))) == [255, 0, 0]
    lab = Image.new("LAB", (1, 1), (200, 10, 20))
    assert pixel(lab, "L") == pixel(lab.convert("RGB"), "L")
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert pixel(palette) == [10, 20, 30]


def test_transparent_pixels_become_white():
    assert pixel(Image.new("RGBA", (1, 1), (10, 20, 30, 0))) == [255, 255, 255]
    assert pixel(Image.new("RGBA", (1, 1), (10, 20, 30, 255))) == [10, 20, 30]
    assert pixel(Image.new("RGBA", (1, 1), (0, 0, 0, 51))) == [204, 204, 204]
    assert pixel(Image.new("LA", (1, 1), (40, 0)), "L") == [255]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert pixel(palette) == [255, 255, 255]


def test_16_bit_images_animations_and_orientations_are_read(tmp_path):
    deep = np.array([[0, 256], [0x7FFF, 0xFFFF]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a-deep.png")
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "b-moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture = noise((2, 2))
    picture.save(tmp_path / "c-turned.png", exif=exif)
    images = load_images(config(tmp_path, 2)).read(0, 3)
    assert images[0, 0].tolist() == [[0, 1], [0x7F, 0xFF]]
    assert images[1, :, 0, 0].tolist() == [255, 0, 0]
    assert np.array_equal(images[2].transpose(1, 2, 0), np.asarray(picture)[::-1, ::-1])


def test_mode_l_is_grey(tmp_path):
    save(tmp_path, ["1.png"])
    images = load_images(config(tmp_path, mode="L"))
    assert images.shape == (1, 8, 8)
    assert np.array_equal(images.read(0, 1)[0, 0], np.asarray(noise((8, 8)).convert("L")))


@pytest.mark.parametrize("harm", ["truncated", "text", "empty", "floating"])
def test_an_unreadable_image_is_named(tmp_path, harm):
    save(tmp_path, ["1.png", "2.png"], size=64)
    bad = tmp_path / "bad.png"
    if harm == "truncated":
        bad.write_bytes((tmp_path / "1.png").read_bytes()[:5000])
    elif harm == "floating":
        bad = tmp_path / "bad.tiff"
        Image.fromarray(np.zeros((8, 8), np.float32)).save(bad)
    else:
        bad.write_bytes(b"hello" if harm == "text" else b"")
    images = load_images(config(tmp_path))
    assert images.read(0, 2).shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match=f"image {bad} could not be read"):
        images.read(1, 3)


def test_a_decompression_bomb_is_named(tmp_path, monkeypatch):
    noise((100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="bomb.png"):
        load_images(config(tmp_path)).read(0, 1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": None}, "data.size is null"),
        ({"size": 0}, "data.size is 0"),
        ({"mode": "RGBA"}, "data.mode is 'RGBA'; expected one of RGB, L"),
        ({}, "has no images; expected files that end in .png"),
    ],
)
def test_invalid_settings_are_user_errors(tmp_path, options, sentence):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=sentence):
        load_images(config(tmp_path, **({"size": 8} | options)))


def test_the_fingerprint_depends_on_content_names_and_settings(tmp_path):
    save(tmp_path / "a", ["1.png", "2.png", "3.png"])
    save(tmp_path / "b", ["1.png", "2.png", "3.png"])
    first = load_images(config(tmp_path / "a")).fingerprint
    assert load_images(config(tmp_path / "b")).fingerprint == first
    variants = [config(tmp_path / "a", **o) for o in ({"size": 4}, {"mode": "L"}, {"limit": 2})]
    prints = {first, *(load_images(variant).fingerprint for variant in variants)}
    os.rename(tmp_path / "a" / "3.png", tmp_path / "a" / "4.png")
    prints.add(load_images(config(tmp_path / "a")).fingerprint)
    noise((8, 8), 99).save(tmp_path / "a" / "4.png")
    prints.add(load_images(config(tmp_path / "a")).fingerprint)
    assert len(prints) == 6


def test_files_are_hashed_once_unless_the_index_is_not_writable(tmp_path, monkeypatch):
    save(tmp_path / "data", ["1.png", "2.png"])
    hashed: list[str] = []
    real = atomic.sha256_file
    monkeypatch.setattr(
        atomic, "sha256_file", lambda path: (hashed.append(path.name), real(path))[1]
    )
    first = load_images(config(tmp_path / "data")).fingerprint
    assert load_images(config(tmp_path / "data")).fingerprint == first
    assert hashed == ["1.png", "2.png"]
    os.utime(tmp_path / "data" / "2.png", (1, 1))
    assert load_images(config(tmp_path / "data")).fingerprint == first
    assert hashed == ["1.png", "2.png", "2.png"]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "file" / "below"))
    assert load_images(config(tmp_path / "data")).fingerprint == first


def test_links_are_followed_without_loops(tmp_path):
    save(tmp_path / "elsewhere", ["1.png", "2.png"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    images = load_images(config(tmp_path / "data"))
    assert len(images) == 2 and images.labels.tolist() == [0, 0]
    for name, other in (("a", "b"), ("b", "a")):
        save(tmp_path / "pair" / name, [f"{name}.png"])
        (tmp_path / "pair" / name / "link").symlink_to(tmp_path / "pair" / other)
    names = load_images(config(tmp_path / "pair")).pixels.names
    assert names == ("a/a.png", "a/link/b.png", "b/b.png", "b/link/a.png")


def test_each_of_test_and_val_stands_for_the_other(tmp_path: Path) -> None:
    for there, absent in (("test", "val"), ("val", "test")):
        save(tmp_path / there, ["train/1.png", f"{there}/2.png", f"{there}/3.png"])
        assert len(load_images(config(tmp_path / there, split=absent))) == 2


def test_values_beyond_16_bits_are_black_or_white() -> None:
    values = np.array([[-5, 0], [65535, 70000]], np.int32)
    assert prepare(Image.fromarray(values), 2, "L").tolist() == [[[0, 0], [255, 255]]]


def test_the_square_is_the_centre_also_of_an_odd_rest() -> None:
    """The mirror image of a picture has the mirror image of its square."""
    grey = np.random.default_rng(0).integers(0, 256, (8, 13), np.uint8)
    for pixels in (grey, grey.T):
        square, mirrored = (
            prepare(Image.fromarray(x), 8, "L")[0] for x in (pixels, pixels[::-1, ::-1])
        )
        assert np.abs(square[::-1, ::-1].astype(int) - mirrored).max() <= 1


def test_hidden_files_among_pictures_are_left_out(tmp_path: Path) -> None:
    save(tmp_path, ["1.png", "2.png"])
    (tmp_path / "._1.png").write_bytes(b"a fork that macOS writes")
    assert read_pictures([tmp_path], (3, 8, 8)).shape == (2, 3, 8, 8)
