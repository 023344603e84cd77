"""Exports with the decoder of another autoencoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from autoencoders import weights
from pipeline.errors import UserError
from pipeline.publishing.export import export
from pipeline.publishing.swap_decoder import with_decoder
from pipeline.runs.directory import read_config, read_manifest
from pipeline.runs.run import open_run
from pipeline.storage import atomic
from tests.pipeline.drawing import plan_of
from tests.pipeline.publishing.test_export import pixels
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import World, say


def changed(run: Path, out: Path, part: str) -> str:
    """Write the weights of a run's autoencoder with one part changed."""
    model = weights.load_weights(Path(str(open_run(run).autoencoder_weights())))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith(part):
                value.mul_(1.1)
    tensors, metadata = weights.to_tensors(model, torch.float32)
    atomic.write_tensors(out, tensors, metadata)
    return str(out)


def test_an_exported_run_has_the_new_decoder(run: Path, tmp_path: Path) -> None:
    other = changed(run, tmp_path / "better.safetensors", "decoder")
    rewrite(run / "metrics.json", '{"run": "of the old decoder"}')
    out = export(plan_of(open_run(run)), tmp_path / "out", "float32", other).folder
    assert not (out / "metrics.json").exists()
    Path(other).unlink()  # it lies inside
    assert (
        open_run(out).autoencoder().fingerprint == read_manifest(out).autoencoder.fingerprint
    )
    assert read_manifest(out).exported.origin != open_run(run).fingerprint
    assert read_config(out).autoencoder.weights == str(out / "autoencoder.safetensors")
    assert read_manifest(out).to_json()["standardisation"] == (
        read_manifest(run).to_json()["standardisation"]
    )
    assert not torch.equal(pixels(out), pixels(run))


def test_the_same_autoencoder_by_another_name_keeps_the_metrics(run: Path, tmp_path: Path) -> None:
    own = open_run(run)
    fid = {"n": 40, "reference": "digits", "value": 7.125, "seed": 3}
    sampling = plan_of(own).identity()
    metrics = {"sampling": sampling, "nfe": 24, "fid": fid, "real_test_fid": None}
    rewrite(run / "metrics.json", json.dumps(metrics))
    moved = shutil.copy(str(own.autoencoder_weights()), tmp_path / "moved.safetensors")
    out = export(plan_of(own), tmp_path / "out", "float32", str(moved)).folder
    assert json.loads((out / "metrics.json").read_text()) == metrics


def test_a_guide_gets_the_new_decoder(run: Path, trained: World, tmp_path: Path) -> None:
    other = changed(run, tmp_path / "better.safetensors", "decoder")
    led = open_run(run)  # by itself, which is no less a guide
    plan = plan_of(led, guide=str(trained.root / "run"), guidance=2.0)
    out = export(plan, tmp_path / "out", "float32", other).folder
    plain = export(plan_of(open_run(run)), tmp_path / "plain", "float32", other).folder
    assert (out / "guide" / "flow.json").is_file()
    assert (pixels(out).int() - pixels(plain).int()).abs().max() <= 1


def test_another_encoder_is_refused(run: Path, tmp_path: Path) -> None:
    other = changed(run, tmp_path / "other.safetensors", "encoder")
    with pytest.raises(UserError, match=r"gives other latents than .*decoder_only"):
        with_decoder(open_run(run), other)


def test_a_bare_name_means_a_file_in_the_current_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exported run has a file of the same name, which is not meant."""
    first = export(plan_of(open_run(run)), tmp_path / "first", "float32").folder
    monkeypatch.chdir(tmp_path)
    changed(run, Path("autoencoder.safetensors"), "decoder")
    plan = plan_of(open_run(first))
    out = export(plan, tmp_path / "out", "float32", "autoencoder.safetensors").folder
    assert open_run(out).autoencoder().fingerprint != open_run(run).autoencoder().fingerprint
    assert not torch.equal(pixels(out), pixels(run))


def test_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = changed(run, tmp_path / "better.safetensors", "decoder")
    words = ("export", "--run", run, "--autoencoder")
    assert say(capsys, *words, other, "--out", tmp_path / "out")[0] == 0
    assert "Not measured" in (tmp_path / "out" / "CARD.md").read_text()
    code, _, error = say(capsys, *words, "mnist-kl-193", "--out", tmp_path / "none")
    assert code == 2 and "--autoencoder: the autoencoder weights are 'mnist-kl-193'" in error
    code, _, error = say(capsys, *words, "rgb32-kl", "--out", tmp_path / "none")
    assert code == 2 and "expected (3, 32, 32), as the autoencoder takes" in error
    assert not (tmp_path / "none").exists()


def test_an_encoder_with_another_spread_is_refused(run: Path, tmp_path: Path) -> None:
    """Its means are the same: the second half of the outputs are log-variances."""
    model = weights.load_weights(Path(str(open_run(run).autoencoder_weights())))
    with torch.no_grad():
        model.quant_conv.bias[model.config.embed_dim :] += 0.5
    atomic.write_tensors(
        tmp_path / "other.safetensors", *weights.to_tensors(model, torch.float32)
    )
    with pytest.raises(UserError, match="gives other latents than"):
        with_decoder(open_run(run), str(tmp_path / "other.safetensors"))
