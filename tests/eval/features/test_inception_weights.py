"""The weights' files: every form gives the same network, and no other file passes."""

from __future__ import annotations

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from eval.features.inception_weights import check_state, read_weights, weights_sha256
from eval.features.pytorch_fid import convolutions

SUFFIXES = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")


@pytest.fixture(scope="module")
def state(random_state):
    """Random weights whose batch norms have unit scale, as the published ones."""
    return {k: torch.ones_like(v) if k.endswith("bn.weight") else v
            for k, v in random_state.items()}  # fmt: skip


def write_torchscript(path, state, count=94):
    """Write an archive in the layout of the TorchScript edition: raw records in order."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/code/__torch__.py", "raise SystemExit")
        keys = [f"{name}.{suffix}" for name in list(convolutions())[:count] for suffix in SUFFIXES]
        for i, key in enumerate(keys):
            archive.writestr(f"net/data/{i}", state[key].numpy().tobytes())


def test_all_three_files_have_one_content(state, tmp_path):
    torch.save({**state, "fc.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    write_torchscript(tmp_path / "script.pt", state)
    for name in ("weights.pth", "weights.safetensors", "script.pt"):
        actual = read_weights(tmp_path / name)
        assert weights_sha256(actual) == weights_sha256(state), name
        assert all(torch.equal(actual[k], state[k]) for k in state), name


def test_content_sees_every_number(state, random_state):
    before = weights_sha256(state)
    for suffix in (*SUFFIXES, "bn.weight"):
        key = f"Mixed_7c.branch_pool.{suffix}"
        changed = {**state, key: state[key].clone()}
        changed[key].view(-1)[5] += 1e-3
        assert weights_sha256(changed) != before, key
    without_scale = {k: v for k, v in state.items() if not k.endswith("bn.weight")}
    assert weights_sha256(without_scale) == before


def test_missing_and_misshapen_tensors_are_named(state):
    key = "Mixed_6b.branch7x7_2.conv.weight"
    with pytest.raises(ValueError, match=f"{key} is missing"):
        check_state({k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match=r"is \(7, 7\); expected \(128, 128, 1, 7\)"):
        check_state({**state, key: torch.zeros(7, 7)})


def test_damaged_files_raise(state, tmp_path):
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not a network")
        with pytest.raises(ValueError, match="Inception weights"):
            read_weights(tmp_path / name)
    write_torchscript(tmp_path / "short.pt", state, 93)
    with pytest.raises(ValueError, match="not the TorchScript file"):
        read_weights(tmp_path / "short.pt")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "absent.pth")


def test_a_pickle_that_runs_code_raises(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"Conv2d_1a_3x3.conv.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="Inception weights"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
