"""Keys of earlier versions and where they are now, for error messages."""

from __future__ import annotations

_GONE = "remove it"
_OWN_FILE = "is a key of an autoencoder's configuration (`jkoflow autoencoder train`)"

#: old key, or old section with a star, → what became of it; the first match counts
MOVED = {
    "solver.method": "jko.solver.method",
    "solver.steps": "jko.solver.steps",
    "solver.adjoint": "jko.solver.adjoint",
    "solver.*": _GONE,
    "push.method": "sampler.method",
    "push.steps": "sampler.steps",
    "push.*": _GONE,
    "schedule.h0": "jko.h0",
    "schedule.h_max": "jko.h_max",
    "schedule.h": "jko.h",
    "schedule.rho": "jko.rho or lfm.rho",
    "schedule.max_blocks": "jko.max_blocks or lfm.max_blocks",
    "schedule.tolerance": "jko.tolerance or lfm.tolerance",
    "schedule.free_block": "jko.free_block or lfm.free_block",
    "schedule.gamma1": "lfm.gamma1",
    "schedule.gamma": "lfm.gamma",
    "schedule.iterations": "train.iterations, which may be a list of one value per block",
    "schedule.lr": "train.lr, which may be a list of one value per block",
    "schedule.substeps": "jko.solver.steps, which may be a list of one value per block",
    "schedule.reparameterize": "jko.reparameterize",
    "schedule.eta": "jko.eta",
    "schedule.refine": "jko.refine",
    "schedule.later_iterations": "jko.later_iterations",
    "schedule.*": _GONE,
    "train.interpolant": "lfm.interpolant or fm.interpolant",
    "train.coupling": "lfm.coupling or fm.coupling",
    "train.times": "lfm.times or fm.times",
    "train.snapshot_every": "fm.snapshot_every",
    "train.divergence": "jko.divergence",
    "train.probes": "jko.probes",
    "train.jacobian_weight": "jko.jacobian_weight",
    "train.sigma0": _GONE,
    "train.max_substeps": _GONE,
    "generate.method": "sampler.method",
    "generate.steps": "sampler.steps",
    "generate.block_methods": "sampler.method, which may be a list of one value per block",
    "generate.block_steps": "sampler.steps, which may be a list of one value per block",
    "evaluate.seed": "generate.seed",
    "latents.seed": _GONE,
    "points.seed": "train.seed",
    "points.invert": _GONE,
    "velocity.hidden": "velocity.width and velocity.depth",
    "velocity.clock": _GONE,
    "velocity.beside": "velocity.image_channels",
    "architecture.*": _OWN_FILE,
    "autoencoder_training.*": _OWN_FILE,
}


def replacement(key: str) -> str | None:
    """Return the rest of a sentence on an old key, after `KEY `; None for a key never known."""
    new = MOVED.get(key) or MOVED.get(f"{key.partition('.')[0]}.*")
    if new is None:
        return None
    if new == _GONE:
        return f"is no longer a setting; {_GONE}"
    return new if new == _OWN_FILE else f"is now {new}; rename it"
