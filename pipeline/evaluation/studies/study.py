"""Studies of a run: the FID of several sets of samples, with a file and a plot."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from eval.features.inception import EXTRACTOR
from eval.plots import curves
from pipeline.config.sampling import EvaluateConfig
from pipeline.evaluation.evaluator import Evaluator
from pipeline.evaluation.features import fid_of
from pipeline.evaluation.real_images import require_fid_sample
from pipeline.evaluation.tables import sampling_text
from pipeline.sampling.sampling_plan import SamplingPlan
from pipeline.storage import atomic


class Study:
    """Study of several sets of samples that start from the same noise.

    Images and features lie in the stores of an evaluation, so a study that is interrupted or
    extended computes only what is missing. `identity` is what all rows share, as JSON values; the
    solvers of the plan are left out.

    Raises:
        UserError: n is below 2.
    """

    def __init__(self, plan: SamplingPlan, settings: EvaluateConfig, evaluator: Evaluator) -> None:
        require_fid_sample(settings.n)
        self.folder, self.evaluator = plan.run.folder, evaluator
        self._n, self._seed = settings.n, plan.settings.seed
        self._reference = evaluator.reference(settings.reference)
        sampling = plan.identity()
        del sampling["solvers"]
        # the content behind the name of a reference may change
        moments = self._reference.mean.tobytes() + self._reference.cov.tobytes()
        self.identity: dict[str, Any] = {
            "n": settings.n,
            "seed": self._seed,
            "reference": settings.reference,
            "reference_sha256": hashlib.sha256(moments).hexdigest(),
            "extractor": EXTRACTOR,
            "batch_size": plan.settings.batch_size,
            "sampling": sampling,
        }

    def measure(self, plan: SamplingPlan) -> dict[str, Any]:
        """Measure network evaluations per sample (nfe) and FID of one plan."""
        images, features = self.evaluator.sample_features(plan, self._n, self._seed)
        return {"nfe": images.manifest["nfe"], "fid": fid_of(features, self._reference)}

    def write(
        self,
        files: tuple[str, str],
        rows: list[dict[str, Any]],
        lines: Mapping[str, tuple[list[float], list[float]]],
        x_label: str,
        **entries: Any,  # noqa: ANN401 - entries of a JSON file
    ) -> dict[str, Any]:
        """Write the study's file, whose content is returned, and its plot into the run.

        `lines` has (x, FID) of each line of the plot by name; `entries` are more entries of the
        file.
        """
        result = {**self.identity, **entries, "rows": rows}
        if self.evaluator.accelerator.is_main_process:
            file, picture = (self.folder / name for name in files)
            atomic.write_json(file, result)
            atomic.write_with(
                picture, lambda out: curves(out, lines, x_label=x_label, y_label="FID")
            )
        return result


def study_heading(result: dict[str, Any]) -> str:
    """Format n, reference, seed and sampling of a study, on one line."""
    text = f"FID(n={result['n']}, {result['reference']}), seed {result['seed']}"
    return text + sampling_text(result["sampling"])
