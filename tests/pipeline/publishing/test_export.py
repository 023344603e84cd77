"""Exported runs: the same pictures from a smaller folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipeline.cli import main
from pipeline.config.plain import resolved_yaml
from pipeline.errors import UserError
from pipeline.publishing.export import export
from pipeline.runs.directory import read_config, read_manifest, write_manifest
from pipeline.runs.manifest import ExportRecord
from pipeline.runs.passes import splits
from pipeline.runs.run import open_run
from pipeline.runs.verify import verify
from pipeline.sampling.image_files import write_grid
from pipeline.storage import atomic, seal
from pipeline.training.planner import next_pass
from pipeline.training.train import train
from tests.pipeline.drawing import images, plan_of, store_of
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, say, write_autoencoder


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


def test_similar_blocks_share_their_mean(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.shared_weights._LEAST", 32)
    monkeypatch.setattr("pipeline.storage.shared_weights._NEAR", 10)  # all blocks are similar
    two = export(plan_of(open_run(run)), tmp_path / "two", "shared")
    ten = export(plan_of(open_run(run)), tmp_path / "ten", "int10")
    assert ten.change < two.change < 0.5
    mean = two.folder / "blocks" / "mean-00.safetensors"
    rows = read_manifest(two.folder).blocks
    assert {row.mean.file for row in rows if row.mean} == {"blocks/mean-00.safetensors"}
    opened = open_run(two.folder)
    assert rows[0].mean is not None and rows[0].mean.sha256[:12] in opened.fingerprint.split("-")
    assert verify(two.folder) == []
    kept = mean.read_bytes()
    atomic.write_bytes(mean, kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match=r"mean-00\.safetensors"):
        open_run(two.folder)
    mean.unlink()
    with pytest.raises(UserError, match=r"lacks blocks/mean-00\.safetensors"):
        open_run(two.folder)
    assert [fault.path for fault in verify(two.folder)] == [mean]


def test_a_mean_without_its_scales_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.shared_weights._LEAST", 32)
    monkeypatch.setattr("pipeline.storage.shared_weights._NEAR", 10)
    out = export(plan_of(open_run(run)), tmp_path / "out", "shared").folder
    path = out / "blocks" / "mean-00.safetensors"
    tensors = {n: v for n, v in load_file(path).items() if not n.endswith(".scale")}
    row = json.loads((out / "flow.json").read_text())
    for block in row["passes"][0]["blocks"]:
        block["mean"]["sha256"] = atomic.write_tensors(path, tensors)
    rewrite(out / "flow.json", json.dumps(row))
    with pytest.raises(UserError, match="has no complete weights"):
        open_run(out)


def test_the_mean_of_a_killed_export_is_removed(run: Path, tmp_path: Path) -> None:
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    before = files(out)
    (out / "flow.json").unlink()
    (out / "blocks" / "mean-00.safetensors").write_bytes(b"of an export as shared")
    export(plan_of(open_run(run)), out)
    assert files(out) == before


def test_an_export_knows_the_parts_of_its_blocks(tmp_path: Path) -> None:
    steps = ("train.iterations=1", "train.preview_every=0", "jko.h=[0.5]", "jko.refine=2")
    for more in ((), ("jko.reparameterize=1",)):
        train(tiny(*steps, *more), tmp_path, Accelerator(), quiet, True, GaussianSource())
    manifest = read_manifest(tmp_path)
    parts = splits(manifest.passes, manifest.number)
    alone = replace(manifest.current, base=None, parts=parts)  # as `export` does
    assert next_pass(read_config(tmp_path), (alone,)) is None


def test_an_export_without_its_autoencoder_is_not_whole(run: Path, tmp_path: Path) -> None:
    out = export(plan_of(open_run(run)), tmp_path / "out").folder
    assert not verify(out)
    (out / "autoencoder.safetensors").unlink()
    assert [fault.path.name for fault in verify(out)] == ["autoencoder.safetensors"]
