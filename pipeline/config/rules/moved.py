"""Keys of earlier versions: where they are now, or why they are gone, for error messages."""

from __future__ import annotations

from collections.abc import Collection

_BLOCK_LIST = ", which may be a list of one value per block"

#: old key → its new place
MOVED = {
    "solver.method": "jko.solver.method",
    "solver.steps": "jko.solver.steps",
    "solver.adjoint": "jko.solver.adjoint",
    "push.method": "sampler.method",
    "push.steps": "sampler.steps",
    "schedule.h0": "jko.h0",
    "schedule.h": "jko.h",
    "schedule.gamma1": "lfm.gamma1",
    "schedule.gamma": "lfm.gamma",
    "schedule.iterations": f"train.iterations{_BLOCK_LIST}",
    "schedule.lr": f"train.lr{_BLOCK_LIST}",
    "schedule.substeps": f"jko.solver.steps{_BLOCK_LIST}",
    "schedule.reparameterize": "jko.reparameterize",
    "schedule.refine": "jko.refine",
    "schedule.later_iterations": "jko.later_iterations",
    "jko.rho": "schedule.rho",
    "jko.max_blocks": "schedule.max_blocks",
    "jko.tolerance": "schedule.tolerance",
    "jko.free_block": "schedule.free_block",
    "lfm.rho": "schedule.rho",
    "lfm.max_blocks": "schedule.max_blocks",
    "lfm.tolerance": "schedule.tolerance",
    "lfm.free_block": "schedule.free_block",
    "lfm.interpolant": "matching.interpolant",
    "lfm.coupling": "matching.coupling",
    "lfm.times": "matching.times",
    "fm.interpolant": "matching.interpolant",
    "fm.coupling": "matching.coupling",
    "fm.times": "matching.times",
    "train.interpolant": "matching.interpolant",
    "train.coupling": "matching.coupling",
    "train.times": "matching.times",
    "train.snapshot_every": "fm.snapshot_every",
    "train.divergence": "jko.divergence",
    "train.jacobian_weight": "jko.jacobian_weight",
    "generate.method": "sampler.method",
    "generate.steps": "sampler.steps",
    "generate.block_methods": f"sampler.method{_BLOCK_LIST}",
    "generate.block_steps": f"sampler.steps{_BLOCK_LIST}",
    "points.seed": "train.seed",
    "velocity.hidden": "velocity.width and velocity.depth",
    "velocity.beside": "velocity.image_channels",
}

_SEED = "the option --seed of `jkoflow generate` and `evaluate` sets it"
_H_MAX = "the largest step size is always 5; jko.h lists other steps"
_ETA = "a later pass always goes half of the way to the evened-out steps"
_PROBES = "training always uses one probe, as the paper does"
_ADAPTIVE = "adaptive solvers always have the tolerances and limits of SolverConfig"
_FIXED_STEP = "the step of the finite difference is fixed"

#: old key, or old section with a star → why it is no setting; the first match counts
GONE = {
    "solver.*": _ADAPTIVE,
    "push.adjoint": "sampling takes no gradients",
    "push.*": _ADAPTIVE,
    "schedule.h_max": _H_MAX,
    "schedule.eta": _ETA,
    "jko.h_max": _H_MAX,
    "jko.eta": _ETA,
    "jko.probes": _PROBES,
    "train.probes": _PROBES,
    "train.sigma0": _FIXED_STEP,
    "train.max_substeps": "a block trains with jko.solver.steps sub-intervals",
    "train.grad_clip": "the norm of the gradient is always clipped at 1",
    "generate.columns": "a grid always has 8 columns",
    "generate.labels": "the option --class of `jkoflow generate` chooses classes",
    "generate.seed": _SEED,
    "evaluate.seed": _SEED,
    "evaluate.kid": "the option --kid of `jkoflow evaluate` sets it",
    "latents.seed": "posterior samples have a fixed seed",
    "points.test": "measurements always use 5000 fresh points",
    "points.compare": "the maximum mean discrepancy always compares 2000 points",
    "points.grid": "the density is always drawn on 100 × 100 points",
    "points.invert": "dark pixels of a picture always carry the density",
    "training.warmup": "the warm-up of an autoencoder always takes 200 steps",
    "velocity.clock": "every network of a block sees the time of its own part",
    "architecture.*": "it belongs to an autoencoder's file (`jkoflow autoencoder train`)",
    "autoencoder_training.*": "it belongs to section training of an autoencoder's file "
    "(`jkoflow autoencoder train`)",
}


def replacement(key: str, sections: Collection[str] = ()) -> str | None:
    """Return the rest of a sentence on an old key, after `KEY `; None for a key never known.

    An unknown key of one of the sections that are there is no key of an old section.
    """
    if key in MOVED:
        return f"is now {MOVED[key]}; rename it"
    section = key.partition(".")[0]
    reason = GONE.get(key) or (None if section in sections else GONE.get(f"{section}.*"))
    return None if reason is None else f"is no setting here: {reason}; remove it"
