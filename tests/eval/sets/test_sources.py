"""Sets in every format hold the same pixels, and statistics of other projects the same moments."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.sets.images import NpzImages
from eval.sets.sources import open_source
from eval.sets.tables import Table, TableImages

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), np.uint8)


def encoded(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def read(path):
    return torch.cat(list(open_source(path).images.batches(3))).numpy().transpose(0, 2, 3, 1)


@pytest.fixture
def table():
    pa = pytest.importorskip("pyarrow")
    plain = [encoded(p) for p in PIXELS]
    cells = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(plain)]
    return pa.table({"label": list(range(7)), "image": cells, "plain": plain})


def test_tables_hold_the_pixels_of_a_folder(tmp_path, table):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for kind, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(str(tmp_path / f"{kind}.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    shards = tmp_path / "shards"
    shards.mkdir()
    pq.write_table(table.slice(0, 4), shards / "0.parquet")
    pq.write_table(table.slice(4), shards / "1.parquet")
    for name in ("a.parquet", "stream.arrow", "file.arrow", "shards"):
        assert np.array_equal(read(tmp_path / name), PIXELS), name
    plain = TableImages(tmp_path / "a.parquet", "plain")
    rows = list(Table(tmp_path / "a.parquet").pictures("image", ["label"]))
    assert [(label, path) for _, (label,), path in rows] == [(i, f"{i}.png") for i in range(7)]
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        held, first = Table(tmp_path / name), 0
        for group, count in enumerate(held.groups):
            some = dict(held.group_pictures(group, "plain", {0, count - 1}))
            assert some == {i: rows[first + i][0] for i in {0, count - 1}}, name
            first += count
        assert first == len(held) == 7 and len(held.groups) > 2
    assert torch.equal(torch.cat(list(plain.batches())), torch.cat(list(
        TableImages(tmp_path / "a.parquet").batches())))  # fmt: skip


def test_bad_tables_are_named(tmp_path, table):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(table.select(["label"]), path)
    with pytest.raises(ValueError, match=r"no column of images \(columns: label\)"):
        open_source(path)
    pq.write_table(table, path)
    pq.write_table(table.rename_columns(["label", "a", "b"]), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"has 2 columns of images \(a, b\); expected one, or"):
        open_source(tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"no images in the column 'label' \(columns: label"):
        TableImages(path, "label")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet is not a complete table"):
        open_source(path)
    pq.write_table(pa.table({"image": [b"no picture", b"x"]}), path)
    with pytest.raises(ValueError, match=r"cannot read image 0 of .*a\.parquet"):
        read(path)
    pq.write_table(pa.table({"image": [None, b"x"]}), path)
    with pytest.raises(ValueError, match=r"image 0 of .*a\.parquet has no bytes"):
        read(path)
    (tmp_path / "junk.arrow").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk\.arrow is not a complete table"):
        open_source(tmp_path / "junk.arrow")


def test_safetensors_hold_the_pixels_of_a_folder(tmp_path):
    images = torch.from_numpy(PIXELS)
    save_file({"x": images}, tmp_path / "last.safetensors")
    first = images.permute(0, 3, 1, 2).contiguous()
    save_file({"images": first, "masks": first[:, :1].contiguous()}, tmp_path / "f.safetensors")
    for name in ("last.safetensors", "f.safetensors"):
        assert np.array_equal(read(tmp_path / name), PIXELS)


@pytest.mark.parametrize(
    "tensors",
    [{"x": torch.zeros(3, 4)}, {"images": torch.full((3, 3, 4, 4), float("nan"))},
     {"a": torch.zeros(3, 3, 4, 4, dtype=torch.uint8), "b": torch.zeros(3, 3, 4, 4).byte()}],
)  # fmt: skip
def test_tensors_that_are_no_images_are_refused(tmp_path, tensors):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="expected one of images, uint8"):
        open_source(tmp_path / "x.safetensors")


def test_statistics_of_other_projects_are_read(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 2048))
    mu, sigma = rows.mean(0), np.cov(rows, rowvar=False)
    np.savez(tmp_path / "VIRTUAL_x.npz", arr_0=PIXELS, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    for protocol in (2, 5):
        nested = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu[:9]}}
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(nested, protocol))
    (tmp_path / "flat.pkl").write_bytes(pickle.dumps({"mu": mu, "sigma": sigma}))
    for name in ("VIRTUAL_x.npz", "edm.npz", "2.pkl", "5.pkl", "flat.pkl"):
        source = open_source(tmp_path / name)
        assert source.stats is not None and source.stats.n is None
        assert np.array_equal(source.stats.mean, mu)
        assert np.array_equal(source.stats.cov, sigma)
        assert (source.images is None) == (name != "VIRTUAL_x.npz")
    assert isinstance(open_source(tmp_path / "VIRTUAL_x.npz").images, NpzImages)


class Danger:
    def __reduce__(self):
        return print, ("a program has run",)


def test_a_pickle_is_not_run(tmp_path, capsys):
    for content, message in (
        ({"mu": Danger()}, "it asks for builtins.print"),
        ({"mu": np.zeros(3)}, "expected the arrays `mu` and `sigma`"),
        ({"fid": {"mu": "x", "sigma": "y"}}, "expected the arrays `mu` and `sigma`"),
    ):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "x.pkl")
    assert capsys.readouterr().out == ""
