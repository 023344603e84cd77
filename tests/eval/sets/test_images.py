from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_fid.fid_score import get_activations

from eval.sets.images import FolderImages, NpzImages
from eval.sets.sources import compute_stats, open_source, stats_of
from tests.eval.moments import stats_from


def pixels(seed, height, width, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Every mode a PNG may have, two sizes, a JPEG, an upper-case suffix, and other files."""
    Image.fromarray(pixels(0, 20, 24)).save(tmp_path / "b.png")
    Image.fromarray(pixels(1, 20, 24)[:, :, 0]).save(tmp_path / "a.png")
    Image.fromarray(pixels(2, 20, 24, 4)).save(tmp_path / "c.png")
    Image.fromarray(pixels(3, 31, 17)).quantize(16).save(tmp_path / "d.png")
    Image.fromarray(pixels(4, 31, 17)).save(tmp_path / "e.jpg", quality=70)
    Image.fromarray(pixels(5, 20, 24)[:, :, 0] > 127).save(tmp_path / "f.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "below.png").mkdir()
    return tmp_path


def no_network():
    raise AssertionError("statistics need no network")


def test_a_folder_gives_the_features_of_pytorch_fid(folder, random_network, random_reference):
    images = FolderImages(folder)
    assert [f.name for f in images.files] == ["a.png", "b.png", "c.png", "d.png", "e.jpg", "f.png"]
    actual = torch.cat([random_network.features(batch) for batch in images.batches()])
    # One at a time: pytorch-fid cannot batch different sizes.
    expected = torch.from_numpy(get_activations(images.files, random_reference, 1, num_workers=0))
    torch.testing.assert_close(
        actual.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
    )


def test_batches_keep_order_and_pixels(tmp_path):
    for i in range(23):
        Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(tmp_path / f"{i:03d}.PNG")
    batches = list(FolderImages(tmp_path).batches(5))
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(23))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_npz_streams_the_same_pixels(tmp_path, save, channels):
    array = np.random.default_rng(0).integers(0, 256, (23, 6, 5, channels), np.uint8)
    save(tmp_path / "images.npz", array)
    images = open_source(tmp_path / "images.npz").images
    assert isinstance(images, NpzImages) and len(images) == 23
    for size in (5, 100):
        actual = torch.cat(list(images.batches(size)))
        assert np.array_equal(actual.numpy(), array.transpose(0, 3, 1, 2))


def test_folder_and_npz_of_the_same_images_agree(tmp_path, random_network):
    array = np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8)
    (tmp_path / "f").mkdir()
    for i, image in enumerate(array):
        Image.fromarray(image).save(tmp_path / "f" / f"{i}.png")
    np.savez(tmp_path / "i.npz", array)
    seen = []
    a, b = (
        compute_stats(open_source(tmp_path / name).images, random_network, seen.append)
        for name in ("f", "i.npz")
    )
    assert seen == [4, 4]
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.cov, b.cov)
    c = stats_of(tmp_path / "i.npz", lambda: random_network)
    assert np.array_equal(a.cov, c.cov)


def test_statistics_need_no_network(tmp_path):
    rng = np.random.default_rng(0)
    stats = stats_from(rng.normal(size=(5, 2048)))
    np.savez(tmp_path / "s.npz", mu=stats.mean, sigma=stats.cov, n=stats.n)
    actual = stats_of(tmp_path / "s.npz", no_network)
    assert np.array_equal(actual.mean, stats.mean) and actual.n == 5
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="have 64 dimensions; expected 2048"):
        stats_of(tmp_path / "small.npz", no_network)


def test_bad_sets_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a path nor a shipped reference"):
        stats_of(tmp_path / "absent", no_network)
    with pytest.raises(ValueError, match="holds 0 images; expected at least 2"):
        open_source(tmp_path)
    Image.fromarray(pixels(0, 4, 4)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="holds 1 images; expected at least 2"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="expected a folder of images, an .npz"):
        open_source(tmp_path / "one.png")
    for name, array, message in (
        ("float", np.zeros((3, 4, 4, 3)), "expected uint8 "),
        ("flat", np.zeros((3, 4, 4), np.uint8), "expected uint8 "),
        ("alpha", np.zeros((3, 4, 4, 4), np.uint8), "expected uint8 "),
        ("single", np.zeros((1, 4, 4, 3), np.uint8), "holds 1 images; expected at least 2"),
    ):
        np.savez(tmp_path / f"{name}.npz", array)
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="expected images .* or statistics"):
        stats_of(tmp_path / "other.npz", no_network)
    with pytest.raises(ValueError, match="has no array `arr_0`"):
        NpzImages(tmp_path / "other.npz")


@pytest.mark.parametrize("damage", ["empty", "cut", "junk", "flipped"])
def test_an_unreadable_picture_is_named(folder, damage):
    file = folder / "b.png"
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    content = {"empty": b"", "cut": whole[:200], "junk": b"x" * 300, "flipped": bytes(flipped)}
    file.write_bytes(content[damage])
    with pytest.raises(ValueError, match=r"cannot read the image .*b\.png"):
        list(FolderImages(folder).batches())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_named(tmp_path, save):
    path = tmp_path / "i.npz"
    save(path, np.random.default_rng(0).integers(0, 256, (50, 9, 9, 3), np.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"i\.npz is .* damaged"):
        open_source(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"i\.npz is damaged"):
        list(NpzImages(path).batches())


def test_an_npz_whose_entry_has_no_utf8_name_is_damaged(tmp_path):
    path = tmp_path / "i.npz"
    np.savez(path, np.zeros((2, 9, 9, 3), np.uint8))
    whole = path.read_bytes()
    place = whole.index(b"PK\x01\x02")  # of the entry in the directory
    name = whole.index(b"arr_0", place)
    damaged = bytearray(whole)
    damaged[place + 9] |= 0x08  # the flag that promises UTF-8
    damaged[name] = 0x80
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"i\.npz is not an \.npz, or is damaged"):
        open_source(path)


def test_leaving_early_stops_the_readers(tmp_path):
    import threading

    for i in range(40):
        Image.fromarray(pixels(i, 4, 4)).save(tmp_path / f"{i}.png")
    before = threading.active_count()
    batches = FolderImages(tmp_path).batches(2)
    next(batches)
    batches.close()
    assert threading.active_count() == before
