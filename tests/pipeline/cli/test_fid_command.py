"""`jkoflow fid` against pytorch-fid's own command, on the same PNGs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from eval.features.inception_weights import read_weights
from eval.features.pytorch_fid import convolutions
from tests.pipeline.tiny import say

#: where pytorch-fid looks for its weights before it downloads them
CACHED = "hub/checkpoints/pt_inception-2015-12-05-6726825d.pth"


@pytest.fixture(scope="module")
def torch_home(tmp_path_factory, inception_weights):
    """A torch cache in which pytorch-fid finds the weights that `jkoflow fetch` brought."""
    weights = read_weights(inception_weights)
    home = tmp_path_factory.mktemp("torch")
    state = {k: v for k, v in weights.items()}
    for name in convolutions():
        state.setdefault(f"{name}.bn.weight", torch.ones_like(weights[f"{name}.bn.bias"]))
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    (home / CACHED).parent.mkdir(parents=True)
    torch.save(state, home / CACHED)
    return home


def pictures(folder, seed, mode, n=24):
    """Smooth random pictures of one size."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(n):
        shape = (8, 8) if mode == "L" else (8, 8, 3)
        small = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
        small.resize((32, 32), Image.Resampling.BICUBIC).save(folder / f"{index}.png")


def test_pytorch_fids_own_network_gives_the_same_number(tmp_path, inception_weights, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    pictures(a, 1, "RGB")
    pictures(b, 2, "RGB")
    values = []
    for features in ("jkoflow", "pytorch-fid"):
        code, out, _ = say(capsys, "fid", a, b, "--features", features)
        assert code == 0
        values.append(float(out))
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[0] > 1 and values[0] != values[1]  # two networks, rounded differently


def test_an_unknown_network_is_refused(tmp_path, capsys):
    code, _, error = say(capsys, "fid", "mnist-train", "mnist-train", "--features", "clip")
    known = "jkoflow, bf16, pytorch-fid"
    assert code == 2 and f"--features is 'clip'; expected one of {known}" in error


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_same_number_as_pytorch_fid(tmp_path, torch_home, mode):
    a, b = tmp_path / "a", tmp_path / "b"
    pictures(a, 1, mode)
    pictures(b, 2, mode)
    ours = command(["-m", "pipeline", "fid", str(a), str(b)], {})
    theirs = command(
        ["-m", "pytorch_fid", str(a), str(b), "--device", "cpu", "--num-workers", "0"],
        {"TORCH_HOME": str(torch_home)},
    )
    assert ours == pytest.approx(theirs, rel=1e-3)


def command(arguments, environment):
    """The number on the last line of stdout."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])
