"""A JKO run that starts from blocks of local flow matching."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from flows.freezing import can_freeze
from flows.networks.base import Velocity
from flows.networks.config import VelocityConfig
from flows.networks.registry import KINDS
from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.runs.directory import read_config, read_manifest
from pipeline.runs.run import load_blocks, open_run
from pipeline.training.train import Outcome, train
from pipeline.training.warm_start import open_warm_start
from tests.pipeline.gaussian_source import GaussianSource, quiet, tiny
from tests.pipeline.records import rewrite
from tests.pipeline.tiny import ROOT, World, say

#: a learning rate that moves nothing keeps the initial weights
STILL = ("train.lr=1e-12", "train.iterations=1")


def run(folder: Path, *overrides: str, **request: int) -> Outcome:
    config = tiny(*overrides)
    return train(config, folder, Accelerator(), quiet, True, GaussianSource(), **request)


@pytest.fixture(scope="module")
def cheap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of local flow matching and a free one."""
    folder = tmp_path_factory.mktemp("initial") / "lfm"
    times = ("train.objective=lfm", "lfm.gamma=[0.1,0.3]", "schedule.free_block=true")
    run(folder, *times)
    return folder


def weights(folder: Path) -> list[Tensor]:
    flow = load_blocks(folder, read_manifest(folder))
    return [torch.cat([p.flatten() for p in block.parameters()]) for block in flow]


@pytest.mark.parametrize(
    ("h", "free", "counterparts"),
    [
        ([0.1, 0.3], True, [0, 1, 2]),
        ([0.1], True, [0, 2]),  # free from free
        ([0.1, 0.2], False, [0, 1]),
        ([0.1, 0.2, 0.3, 0.4], True, [0, 1, 2, 2, 2]),  # the fourth from the one before it
    ],
)
def test_blocks_start_from_their_counterparts(
    cheap: Path, tmp_path: Path, h: list[float], free: bool, counterparts: list[int]
) -> None:
    shape = (f"jko.h={h}", f"schedule.free_block={str(free).lower()}")
    run(tmp_path, *STILL, *shape, f"train.init_from={cheap}")
    theirs, ours = weights(cheap), weights(tmp_path)
    assert len(ours) == len(counterparts)
    for mine, index in zip(ours, counterparts, strict=True):
        torch.testing.assert_close(mine, theirs[index], rtol=0, atol=1e-9)
    manifest = read_manifest(tmp_path)
    assert {row.objective for row in manifest.blocks} == {"jko"}
    kept, rows = manifest.init_from, read_manifest(cheap).blocks
    assert (kept.run, kept.name, kept.objective) == (str(cheap), "gaussian", "lfm")
    assert [row.sha256 for row in kept.blocks] == [row.sha256 for row in rows]


def test_a_start_that_is_near_lowers_the_nll(cheap: Path, tmp_path: Path) -> None:
    steps = ("jko.h=[0.1,0.3]", "schedule.free_block=true", "train.iterations=5")
    run(tmp_path / "from", *steps, f"train.init_from={cheap}", "train.lr=0.003")
    run(tmp_path / "random", *steps, "train.lr=0.003")
    actual = [read_manifest(tmp_path / name).passes[0].summary for name in ("from", "random")]
    assert actual[0].nll < actual[1].nll - 0.05


def test_a_resumed_training_needs_the_same_weights(cheap: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cheap, tmp_path / "lfm"))
    start = ("train.iterations=3", f"train.init_from={other}")
    whole = tmp_path / "whole"
    run(whole, *start)
    while len(_blocks(tmp_path / "run")) < 1:
        run(tmp_path / "run", *start, "train.max_minutes=1e-9")
    (other / "blocks" / "block-01.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match=r"block-01.safetensors is damaged"):
        run(tmp_path / "run", *start)
    shutil.copy(cheap / "blocks" / "block-01.safetensors", other / "blocks")
    assert run(tmp_path / "run", *start).complete
    assert all(map(torch.equal, weights(tmp_path / "run"), weights(whole)))


def test_other_weights_before_the_first_block_is_finished(cheap: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cheap, tmp_path / "lfm"))
    start = ("train.iterations=3", f"train.init_from={other}")
    run(tmp_path / "whole", *start)
    run(tmp_path / "run", *start, "train.max_minutes=1e-9")
    assert _blocks(tmp_path / "run") == []
    times = ("train.objective=lfm", "lfm.gamma=[0.1,0.3,0.9]", "schedule.free_block=true")
    assert run(other, *times, "train.iterations=5", add_blocks=1).complete
    assert run(tmp_path / "run", *start).complete  # with those that it began with
    assert all(map(torch.equal, weights(tmp_path / "run"), weights(tmp_path / "whole")))


def test_a_run_is_what_its_finished_blocks_are(cheap: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cheap, tmp_path / "lfm"))
    text = (other / "config.yaml").read_text()
    assert text.count("  kind: linear\n") == 1
    rewrite(other / "config.yaml", text.replace("  kind: linear\n", "  kind: mlp\n"))
    assert run(tmp_path / "run", "train.iterations=3", f"train.init_from={other}").complete


def _blocks(folder: Path) -> list[object]:
    there = (folder / "flow.json").is_file()
    return list(read_manifest(folder).blocks) if there else []


def test_what_cannot_be_a_start(cheap: Path, tmp_path: Path) -> None:
    curved = ("velocity.kind=mlp", "velocity.width=8", "velocity.depth=1")
    with pytest.raises(
        UserError, match=r"another velocity network: velocity.kind \(linear, not mlp\), velocity."
    ):
        run(tmp_path / "run", *curved, f"train.init_from={cheap}")
    three = tuple(tuple(float(i == j) for j in range(3)) for i in range(3))
    with pytest.raises(UserError, match=r"has latents of shape \(2,\); --init-from needs \(3,\)"):
        config = tiny(f"train.init_from={cheap}")
        train(config, tmp_path / "run", Accelerator(), quiet, False, GaussianSource(three))
    with pytest.raises(UserError, match="no run at"):
        run(tmp_path / "run", f"train.init_from={tmp_path / 'nowhere'}")
    assert not (tmp_path / "run").exists()


def test_a_wider_network_starts_as_the_narrow_one(tmp_path: Path) -> None:
    times = ("train.objective=lfm", "lfm.gamma=[0.1,0.3]")
    net = ("velocity.kind=resmlp", "velocity.depth=2", "velocity.time_features=8")
    run(tmp_path / "narrow", *times, *net, "velocity.width=6")
    start = f"train.init_from={tmp_path / 'narrow'}"
    run(tmp_path / "wide", *times, *net, "velocity.width=18", *STILL, start)
    narrow, wide = (open_run(str(tmp_path / name)).flow for name in ("narrow", "wide"))
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    assert len(wide) == len(narrow) > 1
    assert float((narrow.encode(z) - z).norm()) > 0.1
    torch.testing.assert_close(wide.encode(z), narrow.encode(z), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"width \(6, not 16; a multiple of it would do\)"):
        run(tmp_path / "no", *times, *net, "velocity.width=16", start)


def test_several_networks_start_as_copies_of_one(tmp_path: Path) -> None:
    times = ("train.objective=lfm", "lfm.gamma=[0.1,0.3]", "sampler.steps=4")
    net = ("velocity.kind=resmlp", "velocity.depth=2", "velocity.time_features=8")
    run(tmp_path / "one", *times, *net, "velocity.width=6")
    start = f"train.init_from={tmp_path / 'one'}"
    two = (*net, "velocity.width=6", "velocity.nets=2")
    run(tmp_path / "two", *times, *two, *STILL, start)
    one, several = (open_run(str(tmp_path / name)).flow for name in ("one", "two"))
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    assert float((one.encode(z) - z).norm()) > 0.1
    torch.testing.assert_close(several.encode(z), one.encode(z), rtol=1e-4, atol=1e-4)
    back = (*net, "velocity.width=6", f"train.init_from={tmp_path / 'two'}")
    with pytest.raises(UserError, match=r"another velocity network: velocity.nets \(2, not 1\)"):
        run(tmp_path / "back", *times, *back)


def test_from_the_command_line(
    trained: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, run = trained.config(), tmp_path / "polished"
    monkeypatch.chdir(trained.root)  # a relative path is kept as an absolute one
    words = ("train", "-c", config, "-r", run, "--set", "train.iterations=1")
    assert say(capsys, *words, "--init-from", "run")[0] == 0
    assert read_config(run).train.init_from == str(trained.root / "run")
    assert len(open_run(run).flow) == 3
    given = ("--set", "train.init_from=run", "--run", tmp_path / "again")
    assert say(capsys, *words, *given)[0] == 0
    assert read_config(tmp_path / "again").train.init_from == str(trained.root / "run")
    code, _, error = say(capsys, *words, "--set", "velocity.width=8", "--init-from", "run",
                         "--resume")  # fmt: skip
    assert code == 2 and error.startswith("error: ")


@pytest.mark.parametrize("interpolant", ["linear", "trigonometric"])
@pytest.mark.parametrize("nets", [1, 2])
def test_autonomous_blocks_start_as_parts_of_one_block(
    tmp_path: Path, nets: int, interpolant: str
) -> None:
    """Blocks k of K start as the field at the time (k + 1/2) / K, and together map alike."""
    net = ("velocity.kind=mlp", "velocity.width=16", "velocity.depth=1")
    several = (f"velocity.nets={nets}", "sampler.steps=4")
    path = f"matching.interpolant={interpolant}"
    run(tmp_path / "fm", "train.objective=fm", path, *net, *several, "train.iterations=200")
    steps = f"jko.h={[0.2] * 7}"
    start = f"train.init_from={tmp_path / 'fm'}"
    run(tmp_path / "jko", steps, "schedule.free_block=true", *net, *STILL, start)
    whole, parts = (open_run(str(tmp_path / name)).flow for name in ("fm", "jko"))
    assert (len(whole), len(parts)) == (1, 8)
    assert parts.specs[0].velocity.autonomous and not whole.specs[0].velocity.autonomous
    assert all(bool(part.skip) == (interpolant == "linear") for part in parts.specs)
    z = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    moved = float((whole.encode(z) - z).norm())
    assert moved > 1.0
    assert float((whole.encode(z) - parts.encode(z)).norm()) < 0.02 * moved


class Rate(Velocity):
    """The network of a plug-in: v = a z."""

    def __init__(self, config: VelocityConfig, shape: tuple[int, ...]) -> None:
        super().__init__(shape, config.classes)
        self.rate = torch.nn.Parameter(torch.zeros(shape))

    def forward(self, t: Tensor, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.rate * z


def test_the_network_of_a_plugin_is_not_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freezing a time needs to know the layers of a network."""
    monkeypatch.setitem(KINDS, "rate", Rate)
    run(tmp_path / "fm", "train.objective=fm", "velocity.kind=rate")
    start = ("velocity.kind=rate", f"train.init_from={tmp_path / 'fm'}")
    with pytest.raises(UserError, match=r"velocity.autonomous \(False, not True\)"):
        run(tmp_path / "jko", *start, "velocity.autonomous=true")
    run(tmp_path / "timed", *start, "velocity.autonomous=false")
    classes = dataclasses.replace(tiny(*start).velocity, classes=2)
    with pytest.raises(UserError, match=r"velocity.classes \(0, not 2\)"):
        open_warm_start(str(tmp_path / "fm"), classes, (2,))


def test_the_documented_start_has_one_cache_and_one_network() -> None:
    text = (ROOT / "docs" / "own-images.md").read_text().split("## JKO-iFlow after")[1]
    given = text.split('data="')[1].split('"')[0]
    configs = []
    for line in text.split("\n## ")[0].splitlines():
        words = shlex.split(line.replace("$data", given)) if "jkoflow train" in line else []
        if words:
            sets = [value for flag, value in pairwise(words) if flag == "--set"]
            configs.append(load_config(words[words.index("--config") + 1], sets))
    matched, jko = configs
    assert (matched.train.objective, jko.train.objective) == ("fm", "jko")
    assert (jko.data, jko.autoencoder, jko.latents) == (
        matched.data, matched.autoencoder, matched.latents,
    )  # fmt: skip
    assert can_freeze(matched.velocity)
    assert jko.velocity == dataclasses.replace(matched.velocity, autonomous=True)
