"""Exported and shipped runs: the same pictures from a smaller folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.config.plain import resolved_yaml
from pipeline.errors import UserError
from pipeline.publishing.export import _WRITTEN, export
from pipeline.runs import zoo as shipped
from pipeline.runs.directory import read_config, read_manifest, write_manifest
from pipeline.runs.manifest import ExportRecord
from pipeline.runs.run import open_run
from pipeline.sampling.image_files import write_grid
from pipeline.storage import atomic, seal
from tests.pipeline.drawing import images, plan_of, store_of
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, say, write_autoencoder


@pytest.fixture
def zoo(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship a run by the name of `tiny`, with an empty data root."""
    export(plan_of(open_run(run)), tmp_path / "zoo" / "tiny")
    monkeypatch.setattr(shipped, "zoo", lambda: {"tiny": tmp_path / "zoo" / "tiny"})
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "fresh"))
    return tmp_path / "zoo"


def pixels(folder: Path) -> torch.Tensor:
    return images(open_run(folder))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_export_gives_the_same_pictures(run: Path, tmp_path: Path) -> None:
    half = export(plan_of(open_run(run)), tmp_path / "half")
    whole = export(plan_of(open_run(run)), tmp_path / "whole", "float32")
    expected = pixels(run)
    assert torch.equal(pixels(whole.folder), expected)
    assert (pixels(half.folder).int() - expected.int()).abs().max() <= 1  # a grey level of 256
    assert whole.change == 0 and 0 < half.change < 1e-3
    blocks = [f"blocks/block-{index:02d}.safetensors" for index in range(3)]
    kept = {*blocks, seal.NAME, "flow.json", "config.yaml", "CARD.md", "autoencoder.safetensors"}
    shutil.rmtree(half.folder / "samples")
    assert files(half.folder) == kept
    sizes = [(folder / blocks[0]).stat().st_size for folder in (half.folder, run)]
    assert sizes[0] < 0.6 * sizes[1]
    ten = export(plan_of(open_run(run)), tmp_path / "ten", "int10")
    assert half.change < ten.change < 0.01
    assert (pixels(ten.folder).int() - expected.int()).float().abs().mean() < 1


def test_an_export_records_its_origin(run: Path, tmp_path: Path) -> None:
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    manifest = read_manifest(out)
    first = open_run(run).fingerprint
    assert manifest.exported == ExportRecord(first, "float16")
    assert [row.h for row in manifest.blocks] == [0.5, 0.75, None]
    before = read_config(run)
    assert before.data.path is not None  # of this machine, and of no use on another
    inside = manifest.autoencoder.weights
    assert inside == "autoencoder.safetensors"
    assert read_config(out) == replace(
        before,
        data=replace(before.data, path=None),
        autoencoder=replace(before.autoencoder, weights=str(out / inside)),
    )
    assert str(tmp_path) not in (out / "config.yaml").read_text()
    # an export can be exported: what was rounded once is rounded to itself
    again = export(plan_of(open_run(out)), tmp_path / "again")
    assert again.change == 0
    assert read_manifest(again.folder).exported.before == [first]
    assert [row.sha256 for row in read_manifest(again.folder).blocks] == [
        row.sha256 for row in manifest.blocks
    ]


def test_the_card_has_the_metrics(run: Path, tmp_path: Path) -> None:
    bare = export(plan_of(open_run(run)), tmp_path / "bare").folder
    assert "Not measured" in (bare / "CARD.md").read_text()
    metrics = {
        "fid": {"n": 40, "reference": "digits", "value": 7.125, "seed": 3},
        "real_test_fid": None,
        "nfe": 24,
        "sampling": plan_of(open_run(run)).identity(),
    }
    rewrite(run / "metrics.json", json.dumps(metrics))
    out = export(plan_of(open_run(run)), tmp_path / "measured").folder
    text = (out / "CARD.md").read_text()
    assert text.startswith("# measured\n")
    for words in ("FID(n=40, digits) | 7.12", "seed 3", "NFE a sample | 24", "h = 0.75", "jko",
                  "float16", "to be written", "before they were rounded"):  # fmt: skip
        assert words in text
    assert json.loads((out / "metrics.json").read_text()) == metrics
    again = export(plan_of(open_run(out)), tmp_path / "measured again").folder
    exported = plan_of(open_run(out)).identity()
    measured = json.loads((again / "metrics.json").read_text())
    assert measured == metrics | {"sampling": exported}
    export(plan_of(open_run(again)), tmp_path / "a third time")
    # a file of statistics is known by its name, on any machine
    reference = str(tmp_path / "own.safetensors")
    settings = read_config(run)
    settings = replace(settings, evaluate=replace(settings.evaluate, reference=reference))
    rewrite(run / "config.yaml", resolved_yaml(settings))
    placed = {"fid": metrics["fid"] | {"reference": reference}}
    rewrite(run / "metrics.json", json.dumps(metrics | placed))
    out = export(plan_of(open_run(run)), tmp_path / "placed").folder
    assert read_config(out).evaluate.reference == "own.safetensors"
    for file in ("config.yaml", "metrics.json", "CARD.md"):
        text = (out / file).read_text()
        assert "own.safetensors" in text and str(tmp_path) not in text
    other = {**metrics["sampling"], "run": "another"}
    rewrite(run / "metrics.json", json.dumps(metrics | {"sampling": other}))
    with pytest.raises(UserError, match="measured on other blocks"):
        export(plan_of(open_run(run)), tmp_path / "stale")
    assert not (tmp_path / "stale").exists()


def test_metrics_and_pictures_of_another_plan_are_not_exported(run: Path, tmp_path: Path) -> None:
    guide = Path(shutil.copytree(run, tmp_path / "guide"))
    fid = {"n": 40, "reference": "digits", "value": 7.125, "seed": 3}
    opened = plan_of(open_run(run))
    with_guide = plan_of(opened.run, guide=str(guide), guidance=3.0)
    metrics = {"fid": fid, "real_test_fid": None, "nfe": 24, "sampling": opened.identity()}
    rewrite(run / "metrics.json", json.dumps(metrics))
    with pytest.raises(UserError, match=r"guidance 1\.0, but .* samples with guidance 3\.0"):
        export(with_guide, tmp_path / "guided")
    assert not (tmp_path / "guided").exists()
    sampling = with_guide.identity()
    rewrite(run / "metrics.json", json.dumps(metrics | {"sampling": sampling}))
    export(with_guide, tmp_path / "guided")
    with pytest.raises(UserError, match=r"with guidance 3\.0, but .* with guidance 1\.0;"):
        export(opened, tmp_path / "plain")
    other = {**sampling["guide"], "run": "another"}
    for changed, said in (
        ({"guide": other}, r"guide \{.*'another'\}, but .* guide \{'name': 'tiny'"),
        ({"classes": [3]}, r"classes \[3\], but .* classes None"),
        ({"solvers": [{"method": "euler", "steps": 1}]}, "solvers .*euler.*, but .*rk4"),
    ):
        rewrite(run / "metrics.json", json.dumps(metrics | {"sampling": sampling | changed}))
        with pytest.raises(UserError, match=said):
            export(with_guide, tmp_path / "otherwise")
    (run / "metrics.json").unlink()
    grid = run / "samples" / "grid.png"
    for blocks, shown in ((1, False), (None, True)):
        write_grid(store_of(open_run(run, blocks)), grid, 4, 2)
        out = export(plan_of(open_run(run)), tmp_path / f"with {blocks}").folder
        assert (out / "samples" / "grid.png").is_file() == shown
        out = export(with_guide, tmp_path / f"guided with {blocks}").folder
        assert not (out / "samples" / "grid.png").is_file()
    coarse = {"method": "euler", "steps": 1}
    write_grid(store_of(opened.run, **coarse), grid, 4, 2)
    out = export(opened, tmp_path / "coarse").folder
    assert not (out / "samples" / "grid.png").is_file()
    out = export(plan_of(opened.run, **coarse), tmp_path / "as drawn").folder
    assert (out / "samples" / "grid.png").is_file()
    assert "| sampling | euler, 1 sub-intervals a block |" in (out / "CARD.md").read_text()


def test_a_killed_export_is_made_again(run: Path, tmp_path: Path) -> None:
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    before = {name: (out / name).read_bytes() for name in files(out)}
    (out / "flow.json").unlink()  # written last
    (out / "CARD.md").write_text("half")
    export(plan_of(open_run(run)), out)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    with pytest.raises(UserError, match="not empty"):
        export(plan_of(open_run(run)), out)
    (out / "flow.json").unlink()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not empty"):
        export(plan_of(open_run(run)), out)


def test_files_of_a_killed_export_are_removed(run: Path, tmp_path: Path) -> None:
    """A guide, blocks, metrics and temporary files of the killed export are not kept."""
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    before = files(out)
    (out / "flow.json").unlink()
    shutil.copytree(tmp_path / "out", out / "guide")
    for name in ("CARD.md", seal.NAME):
        (out / "guide" / name).unlink()
    rewrite(out / "metrics.json", "{}")
    (out / "blocks" / "block-07.safetensors").write_bytes(b"of another run")
    half = subprocess.Popen([sys.executable, "-c", ""])
    half.wait()
    host = atomic._HOST
    (out / "blocks" / f".tmp-block-00.safetensors-{host}-{half.pid}-0123abcd").write_bytes(b"ha")
    export(plan_of(open_run(run)), out)
    assert files(out) == before
    (out / "flow.json").unlink()
    (out / "samples").mkdir(exist_ok=True)
    (out / "samples" / "mine.png").write_bytes(b"")  # no export writes that
    with pytest.raises(UserError, match="not empty"):
        export(plan_of(open_run(run)), out)


def test_the_pass_in_use_is_exported(run: Path, trained: World, tmp_path: Path) -> None:
    words = ["train", "--run", run, "--resume", "--refine", "2", "--set",
             "jko.later_iterations=1"]  # fmt: skip
    assert main.main([str(word) for word in words]) == 0
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    manifest = read_manifest(out)
    assert len(manifest.passes) == 1 and len(manifest.blocks) == 5
    assert [row.file for row in manifest.blocks] == [
        f"blocks/block-{index:02d}.safetensors" for index in range(5)
    ]
    assert (pixels(out).int() - pixels(run).int()).abs().max() <= 1


def test_an_export_takes_a_solver(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "euler", "--steps", "3"]
    assert say(capsys, "export", "--run", run, "--out", tmp_path / "out", *words)[0] == 0
    settings = read_config(tmp_path / "out").sampler
    assert (settings.method, settings.steps) == ("euler", 3)
    assert "euler, 3 sub-intervals" in (tmp_path / "out" / "CARD.md").read_text()


def test_exports_that_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, named in (
        (("--out", tmp_path), "not empty"),
        (("--out", tmp_path / "out", "--dtype", "int4"), "--dtype is 'int4'; expected one of"),
    ):
        code, _, error = say(capsys, "export", "--run", run, *words)
        assert code == 2 and error.startswith("error: ") and named in error
    # what it could not be used without is missed before anything is written
    manifest, own = read_manifest(run), tmp_path / "own.safetensors"
    autoencoder = replace(manifest.require_autoencoder(), weights=str(own))
    write_manifest(run, replace(manifest, autoencoder=autoencoder))
    for named in ("is not available", "was trained with another autoencoder"):
        code, _, error = say(capsys, "export", "--run", run, "--out", tmp_path / "out")
        assert code == 2 and error.startswith("error: ") and named in error
        write_autoencoder(own, seed=7)
    assert not (tmp_path / "out").exists()


def test_a_shipped_run_generates_on_a_fresh_machine(
    zoo: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(zoo)
    code, out, _ = say(capsys, "generate", "--run", "zoo:tiny", "-n", "9")
    grid = Path(out.strip())
    assert code == 0 and grid.is_relative_to(tmp_path / "fresh" / "zoo")
    assert Image.open(grid).size[0] > 3 * 12
    assert files(zoo) == before  # package data are left as they are
    # the copy is used from now on
    shutil.rmtree(zoo / "tiny" / "blocks")
    assert say(capsys, "generate", "--run", "zoo:tiny", "-n", "4")[0] == 0
    assert len(open_run(Path("zoo:tiny")).flow) == 3


def test_a_copy_that_was_interrupted_is_finished(zoo: Path, tmp_path: Path) -> None:
    copy = shipped.locate("zoo:tiny")
    (copy / "flow.json").unlink()  # committed last
    (copy / "blocks" / "block-01.safetensors").unlink()
    assert shipped.locate(Path("zoo:tiny")) == copy
    assert len(open_run(copy).flow) == 3


def test_a_newer_version_of_a_shipped_run_is_another_copy(zoo: Path) -> None:
    """Other settings of the same blocks count, too."""
    old = shipped.locate("zoo:tiny")
    text = (zoo / "tiny" / "config.yaml").read_text()
    rewrite(zoo / "tiny" / "config.yaml", text.replace("n: 10", "n: 11"))
    new = shipped.locate("zoo:tiny")
    assert new != old and open_run(new).config.generate.n == 11


def test_the_manifest_of_a_copy_is_written_last(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the run comes last, after that of its guide."""
    shutil.copytree(zoo / "tiny", zoo / "tiny" / "guide")
    written: list[Path] = []
    monkeypatch.setattr(shipped.atomic, "write_bytes", lambda path, _: written.append(path))
    copy = shipped.locate("zoo:tiny")
    assert written[-1] == copy / "flow.json" and copy / "guide" / "flow.json" in written


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--class", "3"),
        ("generate", "--blocks", "99"),
        ("generate", "--guidance", "2", "--guide", "zoo:other"),
        ("edit", "--to", "3"),
        ("evaluate", "--curve"),
        ("likelihood", "--blocks", "99"),
    ],
    ids=" ".join,
)
def test_errors_name_a_shipped_run_as_it_was_given(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    command, *options = words
    code, _, error = say(capsys, command, "--run", "zoo:tiny", *options)
    assert code == 2 and "the run at zoo:tiny" in error, error
    assert str(tmp_path / "fresh") not in error


def test_the_name_of_a_run_is_how_it_was_given(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot of the hub stands for a download."""
    shutil.copytree(zoo / "tiny", tmp_path / "0123456789abcdef")
    shutil.copytree(zoo / "tiny", zoo / "tiny" / "guide")
    monkeypatch.setattr(shipped.hub, "download", lambda *_: tmp_path / "0123456789abcdef")
    for name in ("zoo:tiny", "zoo:tiny/guide", "hf://me/my-digits", str(tmp_path / "run")):
        assert shipped.name_of(shipped.locate(name)) == name
    own = tmp_path / "fresh" / "zoo" / "own"  # no copy, for it has no hash
    assert shipped.name_of(own) == str(own)


def test_init_from_takes_a_shipped_run(
    zoo: Path, trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("JKOFLOW_HOME", str(trained.home))
    words = ("train", "-c", trained.config(), "-r", tmp_path / "new", "--init-from", "zoo:tiny")
    assert say(capsys, *words, "--set", "train.iterations=1")[0] == 0
    kept = read_manifest(tmp_path / "new").init_from
    shipped_rows = read_manifest(zoo / "tiny").blocks
    assert kept.run == "zoo:tiny"
    assert [row.sha256 for row in kept.blocks] == [row.sha256 for row in shipped_rows]
    shutil.rmtree(trained.home / "zoo")
    # exported, a run has no path of this machine, wherever it came from
    words = ("train", "-c", trained.config(), "-r", tmp_path / "more", "--init-from", zoo / "tiny")
    assert say(capsys, *words, "--set", "train.iterations=1")[0] == 0
    out = export(plan_of(open_run(tmp_path / "more")), tmp_path / "shipped").folder
    for path in (out / "flow.json", out / "config.yaml", out / "CARD.md"):
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("verb", ["generate", "evaluate", "likelihood"])
def test_an_unknown_shipped_name_is_refused(
    zoo: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = say(capsys, verb, "--run", "zoo:nothing")
    assert code == 2
    assert error.startswith("error: unknown shipped run 'zoo:nothing'; choose one of tiny, or")


def test_the_guide_inside_a_shipped_run_is_a_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    guide = open_run(Path("zoo:mnist-fm/guide"))
    assert guide.folder.parent == open_run(Path("zoo:mnist-fm")).folder
    assert guide.flow.specs[0].velocity.width == 32
    with pytest.raises(UserError, match="zoo:mnist-fm/refiner is no run; choose one of zoo:mnis"):
        open_run(Path("zoo:mnist-fm/refiner"))


def test_a_missing_autoencoder_is_refused(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "tiny" / "autoencoder.safetensors").unlink()
    code, _, error = say(capsys, "generate", "--run", "zoo:tiny", "-n", "4")
    assert code == 2 and error.count(". ") == 0
    assert error.startswith("error: the autoencoder of the run at ") and "not available" in error


def test_everything_shipped_opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All shipped runs are complete and small, with a card and their autoencoder."""
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path))
    total = 0
    for name, folder in shipped.zoo().items():
        opened = open_run(Path(f"zoo:{name}"))
        assert opened.autoencoder().latent_shape == opened.flow.shape
        plan = plan_of(opened)  # its guide and refiner fit
        refiner = opened.config.generate.refiner
        inside = refiner is not None and not refiner.startswith("zoo:")
        assert inside == (folder / "refiner").is_dir() and (plan.refiner is None) == (not refiner)
        size = sum((folder / file).stat().st_size for file in files(folder))
        assert size < 25e6
        total += size
        strange = [f for f in files(folder) - {"flow.json"} if not _WRITTEN.fullmatch(f)]
        assert not strange, "no export writes that, such as images drawn from the folder itself"
        assert "to be written" not in (folder / "CARD.md").read_text()
    assert 10e6 < total < 105e6  # of the repository, whose clones all carry it
