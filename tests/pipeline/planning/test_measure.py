"""Measurements of plans: counted operations, and bytes that are those of real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from eval.features.folded_conv import FoldedConv
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from pipeline.config.load import load_config
from pipeline.errors import JkoflowError
from pipeline.planning import measure as measuring
from pipeline.planning.estimate import Hardware, Work, estimate, stage_sizes
from pipeline.planning.measure import measure
from pipeline.planning.meter import Meter, convolution_flops
from tests.pipeline.tiny import World, make_world, run_child, say


@pytest.fixture(autouse=True)
def no_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(accelerator: Accelerator) -> Any:
        raise JkoflowError("the weights are absent")

    monkeypatch.setattr(measuring, "load_inception", absent)


def test_operations_of_a_matrix_product_are_counted(accelerator: Accelerator) -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    rate = Meter(accelerator, 0.0).rate(lambda n: (a[:n] @ b).T.exp(), 8, 4)
    assert rate.flops == 2 * 8 * 16 * 32 / 4
    assert rate.kernels == 2 / 4  # the product and the exponential; a transpose is a view


def test_long_work_is_measured_with_fewer_samples(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fixed part, as of an optimiser, is not multiplied; 512 samples would take ten seconds."""
    a, b = torch.randn(512, 16), torch.randn(16, 32)
    meter, sizes = Meter(accelerator, 0.0), list[int]()

    def work(size: int) -> None:
        sizes.append(size)
        torch.mm(a[:size], b)
        torch.mm(b, b.T)  # once for any size

    def seconds(call: Any) -> float:
        call()
        return 0.1 + 0.02 * sizes[-1]

    monkeypatch.setattr(meter, "_seconds", seconds)
    rate = meter.rate(work, 512, 1)
    assert sizes == [1, 1, 41]  # 41 calls with one sample would take less than LONG seconds
    assert rate.seconds == pytest.approx(0.1 + 0.02 * 512)
    assert rate.flops == 2 * 512 * 16 * 32 + 2 * 16 * 32 * 16
    assert rate.kernels == 2
    sizes.clear()
    monkeypatch.setattr(meter, "_seconds", lambda call: (call(), 3.0)[1])
    assert meter.rate(work, 512, 512).seconds == 3.0 and sizes == [1, 1]
    sizes.clear()
    monkeypatch.setattr(meter, "_seconds", lambda call: (call(), 0.001)[1])
    assert meter.rate(work, 512, 512).seconds == 0.001 / 512 and sizes == [1, 512, 512]


def test_the_memory_of_more_samples_is_on_a_line(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample takes 64 MiB; 40 of them are extrapolated from three.

    The memory of this process is another test's, too, so the peaks are given.
    """
    meter, sizes = Meter(accelerator, 0.0), [0]
    monkeypatch.setattr(meter, "_seconds", lambda call: (call(), 1.5 * sizes[-1])[1])
    monkeypatch.setattr(meter, "peak", lambda: float(2**30 + 2**26 * sizes[-1]))
    rate = meter.rate(sizes.append, 40, 1)
    assert sizes == [0, 1, 1, 3]
    assert rate.memory == 2**30 + 40 * 2**26


def test_operations_of_fused_attention_are_those_of_plain_products(
    accelerator: Accelerator,
) -> None:
    """A transformer takes plain products where its samples have gradients."""
    config = VelocityConfig("dit", 16, 2, heads=2, patch=2)
    network, t = make_velocity(config, (3, 8, 8)), torch.tensor(0.5)
    z = torch.randn(2, 3, 8, 8)
    meter = Meter(accelerator, 0.0)
    fused = meter.rate(lambda _: network(t, z), 1, 1)
    plain = meter.rate(lambda _: network(t, z.clone().requires_grad_()), 1, 1)
    assert fused.flops == plain.flops > 0
    trained = meter.rate(lambda _: network(t, z).sum().backward(), 1, 1)
    assert 2.5 * fused.flops < trained.flops < 3.5 * fused.flops


def test_operations_of_folded_convolutions_are_those_of_convolutions() -> None:
    """In float64, FoldedConv is an ordinary convolution, which the counter of torch knows."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(5)

    network, x = FoldedConv([Unit().eval()]).double(), torch.randn(2, 3, 9, 9).double()
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert convolution_flops(network, lambda: network(x)) == counter.get_total_flops() > 0


@pytest.mark.parametrize(("objective", "optimizer"), [("jko", "adam"), ("fm", "muon")])
def test_the_disk_of_a_plan_is_that_of_real_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accelerator: Accelerator,
    objective: str,
    optimizer: str,
) -> None:
    count, draws = 800, 2
    world = make_world(tmp_path, train=count)
    config = world.config(
        latents={"shard_size": 10_000, "batch_size": 250, "draws": draws},
        train={"objective": objective, "iterations": 4, "optimizer": optimizer},
        **({"fm": {"snapshot_every": 2}} if objective == "fm" else {}),
    )
    run = tmp_path / "run"
    run_child("encode", "--config", config, env=world.environment)
    run_child("train", "--config", config, "--run", run, env=world.environment)
    monkeypatch.setenv("JKOFLOW_HOME", str(tmp_path / "elsewhere"))
    measured = measure(load_config(config), accelerator, 0.0)
    work = Work(count, 10)
    steps = {step.name: step for step in estimate(measured, work, Hardware())}

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))

    (cache,) = world.caches()
    assert steps["encode"].disk == pytest.approx(size(cache), rel=0.03)
    stages = sorted((run / "stages").iterdir())
    written = size(run / "blocks") + size(run / "stages")
    written += size(run / "snapshots") if objective == "fm" else 0
    trained = [step.disk for name, step in steps.items() if name.startswith(("train", "push"))]
    assert sum(trained) == pytest.approx(written, rel=0.03)
    assert len(stages) == len(stage_sizes(measured, work)) == len(measured.blocks)
    assert stage_sizes(measured, work)[0] == count * draws
    blocks = sorted((run / "blocks").iterdir())
    assert [path.stat().st_size for path in blocks] == [b.weights for b in measured.blocks]


def test_the_state_of_adam_is_five_times_the_weights(
    world: World, accelerator: Accelerator
) -> None:
    """Weights, gradients, averages and two moments in float32, and a step for each tensor."""
    measured = measure(load_config(world.config()), accelerator, 0.0)
    parameters = measured.blocks[0].weights / 4  # and the head of the file
    assert measured.state / 4 == pytest.approx(5 * parameters, rel=0.2)
    assert measured.checkpoint == pytest.approx(4 * 4 * parameters, rel=0.2)  # no gradients


def test_a_plan_needs_no_data_and_no_cache(world: World, capsys: pytest.CaptureFixture) -> None:
    config = world.config(data={"path": str(world.root / "nowhere")})
    words = ("plan", "--config", config, "--images", "2k", "--gpus", "2", "--price-per-hour", "3")
    code, out, _ = say(capsys, *words, "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["hardware"]["gpus"] == 2 and plan["work"]["images"] == 2000
    encode = plan["measured"]["encode"]
    assert encode["flops"] > 0
    first = plan["steps"][0]
    assert first["name"] == "encode"
    assert first["seconds"] == pytest.approx(2000 * encode["seconds"] / (2 * 0.9))
    assert first["cost"] == pytest.approx(2 * 3 * first["seconds"] / 3600)
    assert [block["iterations"] for block in plan["measured"]["blocks"]] == [6, 6, 6]
    assert not list(world.root.rglob("latents")) and plan["measured"]["features"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--images", "many"), "--images is many; expected a number such as 50000, 1.28M or 1B"),
        (("--images", "1k", "--utilisation", "2"), "--utilisation is 2; expected a value above 0"),
        (("--images", "1k", "--epochs", "0"), "--epochs is 0; expected a value above 0; change"),
        (("--images", "1k", "--epochs", "inf"), "--epochs is inf; expected a value above 0 and"),
        (("--images", "1k", "--price-per-hour", "nan"), "--price-per-hour is nan; expected"),
        (("--images", "1k", "--device-throughput", "X1"), "expected A100, H100, H200, L40S"),
    ],
)
def test_mistakes_are_one_sentence(
    world: World, capsys: pytest.CaptureFixture, words: tuple[str, ...], message: str
) -> None:
    code, out, error = say(capsys, "plan", "--config", world.config(), *words)
    assert code == 2 and out == "" and message in error
