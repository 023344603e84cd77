"""`jkoflow evaluate`, `likelihood`, `fid`, `metrics` and `reference`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import options
from pipeline.cli.session import load_settings, make_accelerator, override_settings, replace_given
from pipeline.errors import UserError
from pipeline.runtime.console import ImageCounter, progress_bar, say


def likelihood_command(
    run: options.RunOption,
    split: Annotated[
        str | None,
        typer.Option(help="Split of the run's data set; default: test, if the set has it."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Rank the images of this folder instead of a split.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="A folder of other images: measure how well the likelihood separates --folder "
            "from them (AUROC); writes auroc.json."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Number of images, from the first on.")] = 200,
    divergence: Annotated[
        str, typer.Option(help="Estimator: exact, hutchinson or finite-difference.")
    ] = "exact",
    probes: Annotated[
        int, typer.Option(help="Probes of a random estimator; 2 or more give a standard error.")
    ] = 1,
    columns: Annotated[int, typer.Option(help="Images per row of the picture.")] = 10,
    blocks: options.BlocksOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="data.path=DIR: the folder of the images on this machine."),
    ] = None,
) -> None:
    """Rank images by likelihood; writes likelihood.json and a picture of both ends."""
    from pipeline.evaluation.ranking import (
        LikelihoodSettings,
        auroc_line,
        likelihood_line,
        rank_images,
        separate_folders,
    )
    from pipeline.runs.run import open_run

    opened = open_run(run, blocks, images=True)
    config = override_settings(opened.config, overrides, ("data.path",))
    opened = replace_given(opened, config=config)
    settings = LikelihoodSettings(n, split, folder, divergence, probes, columns)
    accelerator = make_accelerator()
    if against is not None:
        if folder is None or split is not None:
            raise UserError("--against compares two folders; give --folder, and no --split")
        result = separate_folders(opened, folder, against, settings, accelerator, progress_bar)
        if accelerator.is_main_process:
            say(auroc_line(result))
            print(opened.folder / "auroc.json")
        return
    result = rank_images(opened, settings, accelerator, progress_bar)
    if not accelerator.is_main_process:
        return
    say(likelihood_line(result))
    for path in (opened.folder / "samples/likelihood.png", opened.folder / "likelihood.json"):
        print(path)


def fid_command(
    a: Annotated[str, typer.Argument(help="Images or statistics, as for `metrics`.")],
    b: Annotated[str, typer.Argument(help="Another set, likewise.")],
    features: Annotated[
        str,
        typer.Option(
            help="Implementation of the Inception network: jkoflow; bf16 for the same network in "
            "bfloat16, whose FID is inexact; pytorch-fid for a cross-check with that package."
        ),
    ] = "jkoflow",
) -> None:
    """Compute the FID of two sets of images or statistics; stdout ends with the number alone."""
    from eval.references import reference_names
    from pipeline.evaluation.fid import fid_between

    say(f"shipped references: {', '.join(reference_names()) or 'none'}")
    accelerator = make_accelerator()
    with ImageCounter() as counter:
        value = fid_between(a, b, accelerator, counter.callback, features)
    if accelerator.is_main_process:
        print(repr(value))


def metrics_command(
    a: Annotated[
        str,
        typer.Argument(
            help="Generated images: a folder, or a .npz, .safetensors, .parquet or .arrow."
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            help="Real images likewise, or statistics: a .npz of pytorch-fid, ADM or EDM, a .pkl "
            "of EDM2, or a reference, shipped or not."
        ),
    ],
    mode: Annotated[
        str | None,
        typer.Option(
            help="Resize before Inception: pytorch (default, pytorch-fid's), clean (clean-fid's) "
            "or tensorflow (ADM's and EDM's)."
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="inception, a TorchScript file that you trust, or a folder of a timm or "
            "open_clip model."
        ),
    ] = "inception",
) -> None:
    """Measure images against others; prints one line of JSON.

    It has FID, KID, precision, recall, density, coverage and the Inception score. Each has n, a
    standard error and how the error is estimated. Statistics in place of real images give FID
    and the Inception score.
    """
    import json

    from pipeline.evaluation.metrics import measure_sets

    accelerator = make_accelerator()
    with ImageCounter() as counter:
        result = measure_sets(a, b, accelerator, counter.callback, features, mode)
    if not accelerator.is_main_process:
        return
    if features == "inception" and (reason := result["inception_score"].get("reason")):
        say(f"no Inception score: {reason}")
    print(json.dumps(result))


def reference_command(
    config: options.ConfigOption,
    out: Annotated[Path, typer.Argument(help="The .safetensors to write.")],
    test: Annotated[
        list[int] | None,
        typer.Option("--test", help="Record the FID of n real test images; may be repeated."),
    ] = None,
    overrides: options.SetOption = None,
) -> None:
    """Compute reference statistics of a split (data.split); resumes when interrupted."""
    from pipeline.evaluation.reference import make_reference

    options.require_places(out)
    settings = load_settings(config, overrides)
    accelerator = make_accelerator()
    make_reference(settings, out, test or [], accelerator, progress_bar)
    if accelerator.is_main_process:
        print(out)


def evaluate_command(
    run: options.RunOption,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Number of sampled images. Default: evaluate.n of the run."),
    ] = None,
    seed: options.SeedOption = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference",
            help="A shipped name, a folder, a .npz, or a file of `reference`. Default: "
            "evaluate.reference of the run.",
        ),
    ] = None,
    kid: Annotated[
        int | None,
        typer.Option(
            "--kid",
            help="Number of real images for KID, precision and recall, which are not measured "
            "by default. Their features are stored, once for all runs on the same data.",
        ),
    ] = None,
    steps: options.StepsOption = None,
    method: options.MethodOption = None,
    nfe: options.NfeOption = None,
    nfe_study: Annotated[
        str | None,
        typer.Option(
            "--nfe-study",
            help="Measure FID alone, at each of these budgets of evaluations per sample, such as "
            "8,16,32; writes nfe.json and samples/nfe.png.",
        ),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve",
            help="Measure FID alone, at the weights that fm.snapshot_every kept; writes "
            "curve.json and samples/curve.png.",
        ),
    ] = False,
    guidance: options.GuidanceOption = None,
    guide: options.GuideOption = None,
    refiner: options.RefinerOption = None,
    blocks: options.BlocksOption = None,
    overrides: options.SetOption = None,
    dry_run: options.DryRunOption = False,
) -> None:
    """Measure a run: FID, its floor, KID, precision, recall and NLL; writes metrics.json."""
    from pipeline.evaluation.evaluator import Evaluator, warn_of_other_data
    from pipeline.evaluation.studies import nfe_sweep, training_curve
    from pipeline.evaluation.tables import metrics_line
    from pipeline.runs.unfinished import open_latest
    from pipeline.sampling.sampling_plan import SamplingPlan, with_guidance
    from pipeline.sampling.solvers import with_solver

    if nfe_study is not None and curve:
        raise UserError("--nfe-study and --curve are two measurements; ask for one at a time")
    if nfe_study is not None and (steps is not None or nfe is not None):
        raise UserError("--nfe-study chooses the steps; leave --steps and --nfe out")
    if dry_run and (nfe_study is not None or curve):
        other = "--curve" if curve else "--nfe-study"
        raise UserError(f"--dry-run describes an evaluation without {other}; leave one out")
    if nfe is not None:
        options.require_one_budget(steps)
    opened = open_latest(run, blocks, images=True)
    sections = ("generate", "sampler", "evaluate", "data.path")
    config = override_settings(opened.config, overrides, sections)
    opened = replace_given(opened, config=config)  # the images may be in another folder here
    settings = replace_given(config.evaluate, n=n, reference=reference, kid=kid)
    sampling = with_guidance(replace_given(config.generate, seed=seed), guidance, guide, refiner)
    plan = SamplingPlan.open(with_solver(opened, steps, method), sampling)
    if nfe is not None:
        plan = plan.within(nfe)
    if dry_run:
        from pipeline.dry_run import evaluate_lines

        return print("\n".join(evaluate_lines(plan, settings)))
    accelerator = make_accelerator()
    if opened.training is not None and accelerator.is_main_process:
        say(opened.training.sentence(opened.folder))
    evaluator = Evaluator(accelerator, progress_bar)
    if nfe_study is not None:
        result = nfe_sweep.sweep_nfe(plan, nfe_study, settings, evaluator)
        if accelerator.is_main_process:
            say(nfe_sweep.nfe_table(result))
            print(opened.folder / nfe_sweep.FILE)
        return
    if curve:
        result = training_curve.measure_curve(plan, settings, evaluator)
        if accelerator.is_main_process:
            say(training_curve.curve_table(result))
            print(opened.folder / training_curve.FILE)
        return
    warning = warn_of_other_data(opened, settings.reference)
    if warning and accelerator.is_main_process:
        say(warning)
    metrics = evaluator.evaluate(plan, settings)
    if accelerator.is_main_process:
        say(metrics_line(metrics))
        print(evaluator.file)
