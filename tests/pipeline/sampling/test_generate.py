"""Sampling: the same images from any number of processes, and runs that are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders.base import to_uint8
from autoencoders.weights import load_weights
from flows.solving.solver import SolverConfig
from pipeline.cli.main import main
from pipeline.data.standardisation import Standardisation
from pipeline.errors import UserError
from pipeline.runs.run import Run, open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.generate import sample_batch as sample
from pipeline.sampling.generate import sample_images
from pipeline.sampling.solvers import with_solver
from pipeline.storage import atomic
from pipeline.storage.shards.reader import StoreReader
from tests.pipeline.drawing import plan_of
from tests.pipeline.gaussian_source import quiet
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, say, write_autoencoder


@pytest.fixture
def folder(trained: World, tmp_path: Path) -> Path:
    """Copy a finished run of three blocks, which a test may change."""
    return Path(shutil.copytree(trained.root / "run", tmp_path / "run"))


class Rank:
    """Stand-in for the accelerator of one process of several."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.process_index, self.num_processes = rank, ranks
        self.is_main_process = rank == 0
        self.device = torch.device("cpu")

    def wait_for_everyone(self) -> None:
        """The ranks of a test run one after another."""


def images_of(run: Run, ranks: int = 1, **changes: object) -> StoreReader:
    plan = plan_of(run, **changes)
    settings = plan.settings
    for rank in reversed(range(ranks)):
        if rank:
            with pytest.raises(Exception, match="incomplete"):  # the main process is last
                sample_images(plan, settings.n, settings.seed, Rank(rank, ranks), quiet)  # type: ignore[arg-type]
    return sample_images(plan, settings.n, settings.seed, Rank(0, ranks), quiet)  # type: ignore[arg-type]


def pixels(run: Run, ranks: int = 1, **changes: object) -> torch.Tensor:
    return images_of(run, ranks, **changes).field("images")


def test_an_image_is_decoded_from_inverted_noise(trained: World, folder: Path) -> None:
    run = open_run(folder)
    actual = pixels(run, n=6, batch_size=4)
    flow_json = json.loads((folder / "flow.json").read_text())
    scale = Standardisation.from_dict(flow_json["standardisation"])
    model = load_weights(trained.root / "autoencoder.safetensors")
    expected = []
    with torch.inference_mode():
        for batch, count in enumerate((4, 2)):
            z = torch.randn((count, 2, 3, 3), generator=generator(0, "sample", batch))
            for block in reversed(list(run.flow)):
                z = block.transport(z, reverse=True, solver=SolverConfig("rk4", steps=2)).z
            expected.append(to_uint8(model.decode(scale.undo(z))))
    difference = actual.int() - torch.cat(expected).int()
    assert difference.abs().max() <= 1  # rounding
    assert actual.float().std() > 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_processes(folder: Path, tmp_path: Path, ranks: int) -> None:
    settings = {"n": 1100, "batch_size": 250}
    expected = images_of(open_run(folder), **settings)
    assert len(expected.manifest["shards"]) == 3
    shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("images-*"))
    actual = images_of(open_run(tmp_path / "other"), ranks, **settings)
    assert actual.manifest == expected.manifest
    assert torch.equal(actual.field("images"), expected.field("images"))


def test_stored_images_are_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pixels(open_run(folder))
    monkeypatch.setattr("pipeline.sampling.generate.sample_batch", None)
    assert torch.equal(pixels(open_run(folder)), first)


def test_more_images_begin_with_the_same(folder: Path) -> None:
    run = open_run(folder)
    assert torch.equal(pixels(run, n=12, batch_size=4)[:8], pixels(run, n=8, batch_size=4))


def test_more_images_continue_a_shorter_store(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer images reuse a longer store; a damaged store is not reused."""

    def without_images(name: str) -> Run:
        bare = shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("images-*"))
        return open_run(Path(bare))

    expected = {n: pixels(without_images(str(n)), n=n, batch_size=250) for n in (1700, 2200, 600)}
    calls: list[int] = []
    counting = lambda *a: calls.append(a[3]) or sample(*a)  # noqa: E731
    monkeypatch.setattr("pipeline.sampling.generate.sample_batch", counting)
    run = without_images("grows")
    for n, drawn in ((1700, 1700), (2200, 700), (600, 100)):  # of shards of 500, batches of 250
        calls.clear()
        assert torch.equal(pixels(run, n=n, batch_size=250), expected[n])
        assert sum(calls) == drawn
    for shard in (run.folder / "samples").glob("images-*/shard-00000.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    calls.clear()
    images_of(run, n=550, batch_size=250)
    assert sum(calls) == 550


def test_seeds_and_solvers_give_other_images(folder: Path) -> None:
    run = open_run(folder)
    first = pixels(run)
    assert not torch.equal(first, pixels(run, seed=1))
    folders = {images_of(run, **change).folder for change in ({}, {"seed": 1}, {"n": 9})}
    others = [with_solver(run, *words) for words in (("1",), (None, "euler"))]
    assert len(folders | {images_of(other).folder for other in others}) == 5
    assert images_of(with_solver(run, "3", "euler")).manifest["nfe"] == 9


@pytest.mark.parametrize(("budget", "used"), [(12, 12), (13, 12), (23, 12), (24, 24), (100, 96)])
def test_a_budget_of_evaluations(
    capsys: pytest.CaptureFixture[str], folder: Path, budget: int, used: int
) -> None:
    """Three blocks of rk4 take 12 evaluations per step."""
    code, _, last = say(capsys, "generate", "--run", folder, "-n", "2", "--nfe", budget)
    assert code == 0
    assert f"{used} network evaluations a sample" in last


def test_a_budget_below_one_step_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    code, _, last = say(capsys, "generate", "--run", folder, "--nfe", "11")
    assert code == 2 and "below one rk4 step in each of 3 blocks (12)" in last
    words = ["generate", "--run", folder, "--nfe", "50", "--method", "dopri5"]
    code, _, last = say(capsys, *words)
    assert code == 2 and "fixed-step solver" in last


def test_the_files_hold_the_images(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    grid, npz, singles = tmp_path / "g.png", tmp_path / "all.npz", tmp_path / "singles"
    words = ["generate", "--run", folder, "-n", "7", "--out", grid, "--npz", npz]
    words += ["--images", singles]
    assert say(capsys, *words)[0] == 0
    expected = pixels(open_run(folder), n=7).permute(0, 2, 3, 1).numpy()
    array = np.load(npz)["arr_0"]
    assert array.dtype == np.uint8 and np.array_equal(array, expected)
    names = sorted(path.name for path in singles.iterdir())
    assert names == [f"{index:06d}.png" for index in range(7)]
    for index, name in enumerate(names):
        assert np.array_equal(np.asarray(Image.open(singles / name)), expected[index, :, :, 0])
    picture = np.asarray(Image.open(grid).convert("L"))
    assert 24 <= picture.shape[0] < 48 and picture.shape[1] >= 7 * 24  # a row, doubled
    # the same command again writes the same, also where a killed one left half a file;
    # another n into the same folder does not fit
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = singles / f"{atomic.TEMPORARY_PREFIX}000003.png-{atomic._HOST}-{ended.pid}-0123abcd"
    half.write_bytes(b"half")
    assert say(capsys, *words)[0] == 0 and not half.exists()
    words[words.index("7")] = "5"
    code, _, last = say(capsys, *words)
    assert code == 2 and "holds other files" in last


def test_a_folder_with_other_files_is_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.png").write_bytes(b"sea")
    words = ["generate", "--run", folder, "-n", "2", "--images", tmp_path / "mine"]
    before = sorted(folder.rglob("*"))
    code, _, last = say(capsys, *words)
    assert code == 2 and last.startswith("error: ") and "choose an empty folder" in last
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.png"]
    assert sorted(folder.rglob("*")) == before  # nothing was made that could not be written


# ----------------------------------------------------------------------- runs that are not whole


def refuse(
    capsys: pytest.CaptureFixture[str], folder: Path, *words: str, also: tuple[str, ...] = ()
) -> None:
    for verb in ("generate", "evaluate"):
        code, _, last = say(capsys, verb, "--run", folder, *also)
        assert code == 2 and last.startswith("error: "), last
        for word in words:
            assert word in last, last


def test_a_run_with_nothing_but_its_configuration(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    (folder / "flow.json").unlink()
    refuse(capsys, folder, "no finished block yet", "--resume")


def test_a_run_without_a_configuration(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "config.yaml").unlink()
    refuse(capsys, folder, "no run at", "config.yaml")


def test_a_missing_block(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    (folder / "blocks" / "block-01.safetensors").unlink()
    refuse(capsys, folder, "blocks/block-01.safetensors")


def test_a_flipped_bit_in_a_block(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    path = folder / "blocks" / "block-01.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refuse(capsys, folder, "block-01.safetensors is damaged")
    assert say(capsys, "generate", "--run", folder, "--blocks", "1", "-n", "2")[0] == 0


def test_a_block_of_another_run(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    first, second = (folder / "blocks" / f"block-{index:02d}.safetensors" for index in (0, 1))
    shutil.copy(first, second)
    refuse(capsys, folder, "block-01.safetensors is damaged")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_a_damaged_manifest(capsys: pytest.CaptureFixture[str], folder: Path, text: str) -> None:
    rewrite(folder / "flow.json", text)
    refuse(capsys, folder, "flow.json")


def test_a_damaged_configuration(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    rewrite(folder / "config.yaml", "a: [")
    refuse(capsys, folder, "config.yaml is not readable YAML")
    rewrite(folder / "config.yaml", "colour: red")
    refuse(capsys, folder, "unknown key colour")


def test_another_autoencoder_of_the_same_name_is_refused(
    capsys: pytest.CaptureFixture[str], trained: World, folder: Path, tmp_path: Path
) -> None:
    path = folder / "flow.json"
    other = write_autoencoder(tmp_path / "other.safetensors", seed=5)
    weights = str(trained.root / "autoencoder.safetensors")
    rewrite(path, path.read_text().replace(weights, str(other)))
    code, _, last = say(capsys, "generate", "--run", folder, "-n", "2")
    assert code == 2 and "trained with another autoencoder" in last
    rewrite(path, path.read_text().replace(str(other), str(tmp_path / "gone.safetensors")))
    code, _, last = say(capsys, "generate", "--run", folder, "-n", "2")
    assert code == 2 and "gone.safetensors" in last


def test_an_unfinished_run_can_be_used_by_its_blocks(
    capsys: pytest.CaptureFixture[str], trained: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["train", "--config", trained.config(), "--run", run]
    while not (run / "flow.json").is_file():
        say(capsys, *words, "--resume", "--max-minutes", "1e-9")
    assert main(["generate", "--run", str(run), "-n", "2"]) == 0
    assert "is unfinished; block 1 has its averaged weights of step" in capsys.readouterr().err
    code, _, last = say(capsys, "generate", "--run", run, "-n", "2", "--blocks", "1")
    assert code == 0 and "8 network evaluations a sample" in last
    # the first block of the whole run is the same one
    whole = pixels(open_run(Path(shutil.copytree(trained.root / "run", tmp_path / "w")), 1), n=2)
    assert torch.equal(pixels(open_run(run, 1), n=2), whole)
    for count in ("0", "2", "-1"):
        code, _, last = say(capsys, "generate", "--run", run, "-n", "2", "--blocks", count)
        assert code == 2 and "--blocks must lie between 1 and 1" in last


def test_more_images_than_the_disk_holds_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    code, _, last = say(capsys, "generate", "--run", folder, "-n", str(10**14))
    assert code == 2 and last.startswith(f"error: {10**14} images need about ")
    assert "GB are free at" in last
    assert sorted(folder.rglob("*")) == before


def test_files_larger_than_their_disk_are_refused_before_sampling(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--npz and --images may write to another disk than the run's."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "000000.png").write_bytes(b"an earlier one, which takes no more room")
    small = shutil.disk_usage(folder)._replace(free=2 * 4096 - 1)
    large = shutil.disk_usage(folder)
    monkeypatch.setattr(
        "pipeline.runtime.system.shutil.disk_usage",
        lambda place: small if place == other else large,
    )
    before = sorted(folder.rglob("*"))
    words = ["generate", "--run", folder]
    code, _, last = say(capsys, *words, "-n", "3", "--images", other)
    assert code == 2 and last.startswith("error: 3 pictures need about "), last
    code, _, last = say(capsys, *words, "-n", "60", "--npz", other / "a.npz")  # 144 bytes each
    assert code == 2 and last.startswith("error: 60 images in one archive need about "), last
    assert sorted(folder.rglob("*")) == before
    assert say(capsys, *words, "-n", "2", "--images", other)[0] == 0


def test_stored_images_need_no_disk_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted command resumes when the disk holds just the missing images."""
    run = open_run(folder)
    store = images_of(run, n=1700, batch_size=250)
    (store.folder / "manifest.json").unlink()
    (store.folder / "shard-00003.safetensors").unlink()  # 200 images of 144 bytes
    free = shutil.disk_usage(folder)._replace(free=200 * 144 + 1)
    monkeypatch.setattr("pipeline.runtime.system.shutil.disk_usage", lambda _: free)
    assert len(images_of(run, n=1700, batch_size=250)) == 1700
    with pytest.raises(UserError, match="1701 images need about"):
        images_of(run, n=1701, batch_size=250)


def test_a_grid_needs_no_matplotlib() -> None:
    code = "import sys, pipeline.sampling.generate; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
