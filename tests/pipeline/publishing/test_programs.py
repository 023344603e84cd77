"""Exported programs of sampler and decoder against PyTorch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flows.flow import Flow
from flows.networks.condition import Condition
from flows.networks.config import VelocityConfig
from flows.networks.registry import make_velocity
from flows.solving.solver import FIXED_METHODS, SolverConfig
from flows.spec import BlockSpec, build_block
from pipeline.data.standardisation import Standardisation
from pipeline.publishing import programs
from pipeline.publishing.programs import (
    Program,
    Sampler,
    _export,
    _programs,
    _runner,
    write_programs,
)
from pipeline.runs.run import open_run
from pipeline.runtime.rng import generator
from pipeline.sampling.sampling_plan import SamplingPlan
from tests.pipeline.tiny import say

STANDARDISATION = Standardisation(torch.tensor([0.1, -0.3]), torch.tensor([2.0, 0.5]))


NETWORKS = {
    "unet": VelocityConfig("unet", (4, 8, 4), depth=1, heads=2, classes=3),
    "dit": VelocityConfig("dit", 8, depth=1, heads=2, patch=2, classes=3),
}


def plan(classes: int, guidance: float, method: str) -> SimpleNamespace:
    """Two blocks of random convolutions on latents (2, 4, 4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = VelocityConfig(kind="conv", width=4, depth=1, classes=classes)
        spec = BlockSpec(velocity=config)
        blocks = [(spec, build_block(spec, (2, 4, 4))) for _ in range(2)]
        flow = Flow.from_blocks((2, 4, 4), blocks)
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    run = SimpleNamespace(flow=flow, standardisation=STANDARDISATION)
    solvers = (SolverConfig(method, 2), SolverConfig(method, 3))
    return SimpleNamespace(
        flow=flow, guidance=guidance, class_guidance=guidance, guide=None, run=run, solvers=solvers
    )


def expected(plan, noise, labels):
    condition = None if labels is None else Condition(labels, plan.guidance)
    z = plan.flow.decode(noise, list(plan.solvers), condition=condition)
    return STANDARDISATION.undo(z)


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_the_unrolled_solver_equals_torchdiffeqs(method):
    drawn, noise = plan(0, 1.0, method), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    drawn.flow.double()
    with torch.no_grad():
        actual = Sampler(drawn)(noise)
    torch.testing.assert_close(actual, expected(drawn, noise, None), atol=1e-10, rtol=1e-10)
    assert (actual - STANDARDISATION.undo(noise)).abs().max() > 0.1


@pytest.mark.parametrize(
    "format_", [pytest.param("onnx", marks=pytest.mark.slow), "torch-export"]
)
def test_a_guided_program_equals_pytorch_at_another_batch_size(format_):
    if format_ == "onnx":
        pytest.importorskip("onnxruntime")
    drawn = plan(3, 2.5, "euler")

    def inputs(count):
        return {"noise": torch.randn(count, 2, 4, 4), "labels": torch.arange(count) % 3}

    data = _export(Program("sampler", Sampler(drawn).eval(), inputs, lambda _: None), format_)
    given = inputs(5)
    actual = _runner(format_)(data, given)
    torch.testing.assert_close(actual, expected(drawn, *given.values()), atol=1e-5, rtol=1e-5)


class Field(torch.nn.Module):
    """A velocity network at one time, as a program sees it."""

    def __init__(self, config: VelocityConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.velocity = make_velocity(config, (2, 4, 4))
            for parameter in self.velocity.parameters():
                torch.nn.init.normal_(parameter, std=0.3)

    def forward(self, noise, labels):
        return self.velocity(noise.new_tensor(0.3), noise, labels)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["onnx", "torch-export"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_equals_pytorch_at_another_batch_size(network, format_):
    if format_ == "onnx":
        pytest.importorskip("onnxruntime")
    field = Field(NETWORKS[network]).eval()

    def inputs(count):
        return {"noise": torch.randn(count, 2, 4, 4), "labels": torch.arange(count) % 4}

    given = inputs(5)
    data = _export(Program("field", field, inputs, lambda _: None), format_)
    with torch.no_grad():
        expected = field(**given)
    torch.testing.assert_close(_runner(format_)(data, given), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_programs_make_the_images_of_generate(run: Path, tmp_path: Path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    code, out, error = say(capsys, "export", "-r", run, "--out", tmp_path / "p", "--onnx",
                           "--method", "euler", "--steps", "1")  # fmt: skip
    assert code == 0, error
    assert Path(out.split()[-1]) == tmp_path / "p"
    described = json.loads((tmp_path / "p" / "programs.json").read_text())["programs"]
    assert list(described) == ["sampler.onnx", "decoder.onnx"]
    assert all(entry["difference"] <= 1e-4 for entry in described.values())
    from pipeline.runs.run import open_run
    from pipeline.runtime.rng import generator
    from tests.pipeline.drawing import images

    opened = open_run(run)
    pixels = images(opened, n=4, batch_size=4, method="euler", steps=1)
    noise = torch.randn((4, *opened.flow.shape), generator=generator(0, "sample", 0))
    value = noise.numpy()
    for name in described:
        session = onnxruntime.InferenceSession(tmp_path / "p" / name)
        (value,) = session.run(None, {session.get_inputs()[0].name: value})
    drawn = np.clip(np.round((value + 1) * 127.5), 0, 255)
    assert np.abs(drawn - pixels.numpy()).max() <= 1 and value.std() > 0.01


def test_all_networks_of_a_program_are_in_float32(tmp_path, monkeypatch):
    run = open_run(Path("zoo:cifar10-jko"))
    plan = SamplingPlan.open(run, replace(run.config.generate, precision="bf16"))
    assert plan.refiner.precision == "bf16"
    seen = []
    monkeypatch.setattr(programs, "_programs", lambda given: seen.append(given) or [])
    write_programs(plan, tmp_path / "out", "torch-export")
    (given,) = seen
    assert given.precision == given.refiner.precision == "fp32"


@pytest.mark.slow
def test_the_refiner_of_a_shipped_run_is_a_program():
    run = open_run(Path("zoo:cifar10-jko"))
    plan = SamplingPlan.open(run, run.config.generate)
    (program,) = (p for p in _programs(plan) if p.name == "refiner")
    x = torch.rand((5, 3, 32, 32), generator=generator(0, "test")) * 2 - 1
    noise = torch.randn(x.shape, generator=generator(3, "test"))
    data = _export(program, "torch-export")
    actual = _runner("torch-export")(data, {"images": x, "noise": noise})
    expected = plan.refiner.sample_detail(x, generator(3, "test"))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert 0.01 < float((actual - x).abs().mean()) < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--onnx", "--torch-export"), "choose one"),
        (("--onnx", "--method", "dopri5"), "needs a fixed grid"),
        (("--torch-export", "--dtype", "bfloat16"), "leave --dtype and --autoencoder out"),
    ],
)
def test_mistakes_are_one_sentence(run: Path, tmp_path: Path, capsys, words, message):
    code, _, error = say(capsys, "export", "-r", run, "--out", tmp_path / "p", *words)
    assert code == 2 and message in error and not (tmp_path / "p").exists()
