"""`jkoflow push` and `hf://owner/name`, against a server of the hub's protocol on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from autoencoders.weights import locate_weights
from pipeline.errors import UserError
from pipeline.integrity import hub
from pipeline.publishing.export import export
from pipeline.runs.run import open_run
from tests.pipeline.drawing import images, plan_of
from tests.pipeline.hub_server import Hub, serving_hub
from tests.pipeline.tiny import say

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setattr(hub, "_CACHE", tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", "a token")
        yield server


def test_a_pushed_run_makes_the_same_images(
    server: Hub, run: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    code, out, error = say(capsys, "push", run, "me/digits")
    assert code == 0, error
    assert out.split()[-1] == f"{server.address}/me/digits"
    files = server.repositories["me/digits"]
    head, card = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "jkoflow" and "# digits" in card
    local = export(plan_of(open_run(run)), tmp_path / "digits").folder
    for path in local.rglob("*"):
        if path.is_file():
            assert files[path.relative_to(local).as_posix()] == path.read_bytes()

    expected = images(open_run(local))
    assert torch.equal(images(open_run(Path("hf://me/digits"))), expected)
    weights = locate_weights("hf://me/digits")
    assert weights.read_bytes() == (local / "autoencoder.safetensors").read_bytes()
    code, out, error = say(capsys, "generate", "-r", "hf://me/digits@main", "-n", "4")
    assert code == 0, error
    server.shutdown()  # an earlier download serves without a network
    server.server_close()
    monkeypatch.setattr(hub, "_SECONDS", 1.0)
    assert torch.equal(images(open_run(Path("hf://me/digits"))), expected)


def test_a_strangers_run_is_checked(server: Hub, run: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    local = export(plan_of(open_run(run)), tmp_path / "digits").folder
    whole = {
        path.relative_to(local).as_posix(): path.read_bytes()
        for path in local.rglob("*") if path.is_file()
    }  # fmt: skip
    name = "blocks/block-00.safetensors"
    damaged = whole[name][:-1] + bytes([whole[name][-1] ^ 1])
    for files, message in (
        (whole | {name: damaged}, "is damaged or foreign"),
        ({k: v for k, v in whole.items() if k != "SHA256SUMS"}, "is no run of jkoflow"),
        ({"README.md": b"hello"}, "is no run of jkoflow"),
    ):
        server.repositories["a/b"] = files
        with pytest.raises(UserError, match=message):
            open_run(Path("hf://a/b"))
    server.repositories["a/b"] = whole | {"../../evil.yaml": b"x", "evil.py": b"x"}
    monkeypatch.setenv("JKOFLOW_MAX_GIB", "1e-6")
    with pytest.raises(ValueError, match="hf://a/b claims"):
        open_run(Path("hf://a/b"))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    monkeypatch.delenv("JKOFLOW_MAX_GIB")
    open_run(Path("hf://a/b"))
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://nobody/nothing", "cannot be used"),
        ("hf://../etc", "is none of the hub"),
        ("hf://one", "the name hf://one is none of the hub"),
    ],
)
def test_mistakes_are_one_sentence(server: Hub, capsys, name, message):
    code, _, error = say(capsys, "generate", "-r", name)
    assert code == 2 and message in error and error.splitlines()[-1].startswith("error: ")


def test_a_hub_without_network_is_named(run: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_CACHE", tmp_path / "cache")
    for words in (("generate", "-r", "hf://a/b"), ("push", run, "a/b")):
        code, _, error = say(capsys, *words)
        assert code == 2 and "the repository a/b of the hub cannot be used" in error


def test_offline_mode_takes_earlier_downloads_alone(server: Hub, tmp_path: Path):
    server.repositories |= {"me/old": {"flow.json": b"{}"}, "me/new": {"flow.json": b"{}"}}
    downloaded = hub.download("hf://me/old", ["*.json"])
    reads = server.reads
    code = (
        "import sys; from pathlib import Path; from pipeline.integrity import hub\n"
        "hub._CACHE = Path(sys.argv[1])\n"
        "for name in ('hf://me/old', 'hf://me/new'):\n"
        "    try: print(hub.download(name, ['*.json']))\n"
        "    except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(hub._CACHE)], check=True, capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    first, second = done.stdout.splitlines()
    assert Path(first) == downloaded and server.reads == reads
    assert second.startswith("the repository me/new of the hub cannot be used (")
    assert "offline" in second and second.endswith("the network and `hf auth login`")


def test_a_pushed_run_of_similar_blocks_has_their_mean(
    server: Hub, run: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pipeline.storage.shared_weights._LEAST", 32)
    monkeypatch.setattr("pipeline.storage.shared_weights._NEAR", 10)
    code, _, error = say(capsys, "push", run, "me/two", "--dtype", "shared")
    assert code == 0, error
    assert "blocks/mean-00.safetensors" in server.repositories["me/two"]
    local = export(plan_of(open_run(run)), tmp_path / "two", "shared").folder
    assert torch.equal(images(open_run(Path("hf://me/two"))), images(open_run(local)))
