"""Programs: the sampler, the decoder and the refiner of a run as ONNX or torch.export files.

A program is a graph without Python code of jkoflow. It takes any batch size.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flows.networks.base import Velocity
from flows.networks.condition import Condition
from flows.solving.integration import Segment, make_segments
from flows.solving.solver import SolverConfig
from pipeline.errors import JkoflowError, UserError
from pipeline.runtime.rng import generator
from pipeline.sampling.refiner import Refiner
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic

#: formats, as the option of `jkoflow export` names them, → suffix of the files
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
#: largest difference of a program's output from PyTorch's
TOLERANCE = 1e-4
DESCRIPTION = "programs.json"
_TRACED, _CHECKED = 2, 3

#: stages of a step: the node c and the weights of the earlier slopes; then the weights of all
_TABLEAUS: dict[str, tuple[list[tuple[float, list[float]]], list[float]]] = {
    "euler": ([(0, [])], [1]),
    "midpoint": ([(0, []), (1 / 2, [1 / 2])], [0, 1]),
    "heun2": ([(0, []), (1, [1])], [1 / 2, 1 / 2]),
    "heun3": ([(0, []), (1 / 3, [1 / 3]), (2 / 3, [0, 2 / 3])], [1 / 4, 0, 3 / 4]),
    "rk4": (
        [(0, []), (1 / 3, [1 / 3]), (2 / 3, [-1 / 3, 1]), (1, [1, -1, 1])],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    ),
}


class Sampler(nn.Module):
    """Module that maps noise (B, *shape), and labels (B,) of a run with classes, to latents."""

    def __init__(self, plan: SamplingPlan) -> None:
        super().__init__()
        self.flow, self.guidance = plan.flow, plan.class_guidance
        self.standardisation = plan.run.standardisation
        self.legs = [
            (make_segments(self.flow[k].velocity, solver), solver)
            for k, solver in enumerate(plan.solvers)
        ][::-1]

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Solve every block backwards, from noise (B, *shape) to latents (B, *shape)."""

        def field(velocity: Velocity, t: Tensor, z: Tensor) -> Tensor:
            if labels is None:
                return velocity(t, z)
            v = velocity(t, z, labels)
            if self.guidance == 1:
                return v
            null = torch.full_like(labels, velocity.classes)
            return torch.lerp(velocity(t, z, null), v, self.guidance)

        z = noise
        for segments, solver in self.legs:
            z = _solve_backwards(segments, solver, z, field)
        return self.standardisation.undo(z)


class Decoder(nn.Module):
    """Module that maps latents (B, C_z, H_z, W_z) to images (B, C, H, W) in [-1, 1]."""

    def __init__(self, plan: SamplingPlan) -> None:
        super().__init__()
        self.autoencoder: Any = plan.run.autoencoder()

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C_z, H_z, W_z) to images (B, C, H, W)."""
        images: Tensor = self.autoencoder.decode(latents)
        return images


class RefinerProgram(nn.Module):
    """Module that maps decoded images and noise, (B, C, H, W) each, to refined images."""

    def __init__(self, refiner: Refiner) -> None:
        super().__init__()
        self.flow, self.standardisation = refiner.flow, refiner.run.standardisation
        self.solver = refiner.solver

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Sample the detail that the decoder left out of images (B, C, H, W)."""
        velocity = self.flow[0].velocity.with_image(images.half().float())
        segments = make_segments(velocity, self.solver)
        residual = _solve_backwards(segments, self.solver, noise, lambda v, t, z: v(t, z))
        return (images + self.standardisation.undo(residual)).clamp(-1.0, 1.0)


def _solve_backwards(
    segments: Sequence[Segment],
    solver: SolverConfig,
    z: Tensor,
    field: Callable[[Velocity, Tensor, Tensor], Tensor],
) -> Tensor:
    """Solve dz/dt = v from t = 1 to 0 on the solver's fixed grid, z (B, *shape), unrolled."""
    stages, weights = _TABLEAUS[solver.method]
    for segment in segments[::-1]:
        h = (segment.piece.start - segment.piece.end) / segment.steps
        for step in range(segment.steps):
            start, slopes = segment.piece.end + step * h, list[Tensor]()
            for node, row in stages:
                x = z + h * _weighted(row, slopes) if any(row) else z
                slopes.append(field(segment.piece.field, z.new_tensor(start + node * h), x))
            z = z + h * _weighted(weights, slopes)
    return z


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """Sum weighted slopes (B, *shape) without those of weight 0."""
    terms = [w * k for w, k in zip(weights, slopes, strict=True) if w]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@dataclass(frozen=True)
class Program:
    """Program of a run: a module, its inputs for a batch, and the reference result of PyTorch."""

    name: str
    module: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    reference: Callable[[dict[str, Tensor]], Tensor]


def write_programs(plan: SamplingPlan, out: Path, format_: str) -> dict[str, Any]:
    """Write the programs of a plan, and `programs.json` with their inputs and differences.

    Every program is run on another batch size than that of its tracing and compared with PyTorch.

    Raises:
        UserError: the folder has files, a solver is adaptive, or a library is missing.
        JkoflowError: a program differs from PyTorch by more than 1e-4.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another place with --out")
    for solver in plan.solvers:
        if solver.adaptive:
            raise UserError(
                f"the solver {solver.method} chooses its steps; a program needs a fixed grid; add "
                "--method rk4 --steps 8"
            )
    if plan.refiner is not None and plan.refiner.solver.adaptive:
        raise UserError(
            f"the refiner's solver {plan.refiner.solver.method} chooses its steps; a program "
            "needs a fixed grid; leave the refiner out by --refiner none"
        )
    run_file = _runner(format_)
    plan = dataclasses.replace(
        plan,
        settings=dataclasses.replace(plan.settings, precision="fp32"),
        refiner=None
        if plan.refiner is None
        else dataclasses.replace(plan.refiner, precision="fp32"),
    )
    description: dict[str, Any] = {"sampling": plan.identity(), "programs": {}}
    for program in _programs(plan):
        data = _export(program, format_)
        inputs = program.inputs(_CHECKED)
        with torch.inference_mode():
            expected = program.reference(inputs)
        difference = float((run_file(data, inputs) - expected).abs().max())
        if not difference <= TOLERANCE:
            raise JkoflowError(
                f"the program {program.name} differs from PyTorch by {difference:.2g}; expected "
                f"at most {TOLERANCE}; report this run"
            )
        file = program.name + FORMATS[format_]
        atomic.write_bytes(out / file, data)
        description["programs"][file] = {
            "inputs": {
                key: {"dtype": str(x.dtype).split(".")[1], "shape": ["batch", *x.shape[1:]]}
                for key, x in inputs.items()
            },
            "output": ["batch", *expected.shape[1:]],
            "difference": difference,
        }
    atomic.write_json(out / DESCRIPTION, description)
    return description


def _programs(plan: SamplingPlan) -> list[Program]:
    """List the programs of a plan."""
    flow, sampler, decoder = plan.flow.eval(), Sampler(plan).eval(), Decoder(plan).eval()

    def noise(count: int) -> dict[str, Tensor]:
        rng = generator(0, "program", count)
        inputs = {"noise": torch.randn((count, *flow.shape), generator=rng)}
        if plan.run.flow.classes:
            inputs["labels"] = torch.arange(count) % plan.run.flow.classes
        return inputs

    def sample(inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.get("labels")
        condition = None if labels is None else Condition(labels, sampler.guidance)
        z = flow.decode(inputs["noise"], list(plan.solvers), condition=condition)
        return plan.run.standardisation.undo(z)

    def latents(count: int) -> dict[str, Tensor]:
        return {"latents": sample(noise(count)).clone()}

    programs = [
        Program("sampler", sampler, noise, sample),
        Program("decoder", decoder, latents, lambda x: decoder(x["latents"])),
    ]
    if plan.refiner is not None:
        refiner = plan.refiner
        shape = plan.run.manifest.require_autoencoder().image_shape

        def pictures(count: int) -> dict[str, Tensor]:
            rng = generator(0, "program", count)
            draw = torch.randn((count, *shape), generator=rng)
            return {"images": draw.clamp(-1, 1), "noise": torch.randn(draw.shape, generator=rng)}

        def refine(inputs: dict[str, Tensor]) -> Tensor:
            condition = Condition(image=inputs["images"].half().float())
            residual = refiner.flow.decode(inputs["noise"], refiner.solver, condition=condition)
            return (inputs["images"] + refiner.run.standardisation.undo(residual)).clamp(-1, 1)

        programs.append(Program("refiner", RefinerProgram(refiner).eval(), pictures, refine))
    return programs


def _export(program: Program, format_: str) -> bytes:
    """Trace a program with any batch size, and return the bytes of its file."""
    inputs = program.inputs(_TRACED)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in inputs}
    with torch.no_grad():
        traced = torch.export.export(
            program.module, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
        )
    buffer = io.BytesIO()
    if format_ == "torch-export":
        torch.export.save(traced, buffer)
        return buffer.getvalue()
    result = torch.onnx.export(
        traced, dynamo=True, verbose=False, input_names=list(inputs), output_names=["output"]
    )
    assert result is not None
    return bytes(result.model_proto.SerializeToString())


def _runner(format_: str) -> Callable[[bytes, dict[str, Tensor]], Tensor]:
    """Return the function that runs the bytes of a program on inputs."""
    if format_ == "torch-export":
        return lambda data, inputs: torch.export.load(io.BytesIO(data)).module()(**inputs)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(
            f"the library {error.name} is not installed; expected it for ONNX; run: "
            "pip install 'jkoflow[onnx]'"
        ) from error

    def run(data: bytes, inputs: dict[str, Tensor]) -> Tensor:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(np.asarray(output))

    return run
