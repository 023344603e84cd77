"""What the studies of one run have in common: FID of several sets of images, a file and a plot."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from eval.gaussian import GaussianStats
from eval.inception import EXTRACTOR
from eval.plots import curves
from pipeline.config.schema import EvaluateConfig, GenerateConfig
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.features import fid_of, require_two
from pipeline.evaluation.tables import guidance_of
from pipeline.runs.run import Run
from pipeline.sampling.sampling_plan import way_of
from pipeline.storage import atomic


class Study:
    """Measures sets of images of a run that start from the same noise.

    Images and features are kept as those of an evaluation are, so that a study that was
    interrupted, or is extended, makes only what is missing.

    Args:
        run: an open run.
        settings: n, seed and reference.
        sampling: solver, classes, guidance, guide and refiner.
        evaluator: holds the network.

    Attributes:
        sampling: with n and seed of `settings`.
        about: n, seed, reference, extractor, run, blocks if not all, classes, guidance, guide,
            refiner and precision, for the study's file.

    Raises:
        UserError: n below 2.
    """

    def __init__(
        self, run: Run, settings: EvaluateConfig, sampling: GenerateConfig, evaluator: Evaluator
    ) -> None:
        require_two(settings.n)
        self.run, self.evaluator = run, evaluator
        self.sampling = dataclasses.replace(sampling, n=settings.n, seed=settings.seed)
        self.about: dict[str, Any] = {
            "n": settings.n, "seed": settings.seed, "reference": settings.reference,
            "extractor": EXTRACTOR, "run": run.fingerprint, "labels": sampling.labels,
            "batch_size": sampling.batch_size, "guidance": sampling.guidance,
        }  # fmt: skip
        told = way_of(run, sampling).about()  # None, too, is something that rows may differ in
        self.about |= {key: told.get(key) for key in ("guide", "refiner", "sampled_in")}
        if len(run.flow) < len(run.manifest["blocks"]):
            self.about["first_blocks"] = len(run.flow)
        self._reference = evaluator.reference(settings.reference)
        self.about["reference_sha256"] = _digest(self._reference)

    def measure(self, run: Run, sampling: GenerateConfig) -> dict[str, Any]:
        """Evaluations a sample (nfe) and FID of the images of a run, drawn in some way."""
        images, features = self.evaluator.generated(run, sampling)
        return {"nfe": images.manifest["nfe"], "fid": fid_of(features, self._reference)}

    def finish(
        self,
        files: tuple[str, str],
        rows: list[dict[str, Any]],
        lines: Mapping[str, tuple[list[float], list[float]]],
        x_label: str,
        **more: Any,  # noqa: ANN401 - entries of a JSON file
    ) -> dict[str, Any]:
        """Commit the study's file and its plot in the run directory.

        Args:
            files: names of both.
            rows: what was measured.
            lines: name to (x, FID).
            x_label: what x is.
            more: entries of the file.

        Returns:
            What the file holds.
        """
        result = {**self.about, **more, "rows": rows}
        if self.evaluator.accelerator.is_main_process:
            file, picture = (self.run.folder / name for name in files)
            atomic.write_json(file, result)
            atomic.write_with(
                picture, lambda out: curves(out, lines, x_label=x_label, y_label="FID")
            )
        return result


def _digest(stats: GaussianStats) -> str:
    """Of mean and covariance: what lies under the reference's name may change."""
    return hashlib.sha256(stats.mean.tobytes() + stats.cov.tobytes()).hexdigest()


def heading(result: dict[str, Any]) -> str:
    """What a study's FIDs belong to, on one line."""
    text = f"FID(n={result['n']}, {result['reference']}), seed {result['seed']}"
    if "first_blocks" in result:
        text += f", first {result['first_blocks']} blocks only"
    return text + guidance_of(result)
