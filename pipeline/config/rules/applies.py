"""Settings and sections that apply only under the value of another setting."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from flows.solving.solver import ADAPTIVE_METHODS
from pipeline.config.data import IMAGE_SETS, LATENTS, TABLES
from pipeline.config.keys import keys
from pipeline.config.schema import Config
from pipeline.errors import UserError

Condition = Callable[[Config], bool]


class InapplicableError(UserError):
    """A setting without effect, or the settings of a section that does not apply.

    Args:
        message: of the error.
        names: dotted keys.
        reason: a clause that says what applies where, such as `velocity.heads=4 applies to …`.
    """

    def __init__(self, message: str, names: Sequence[str], reason: str) -> None:
        super().__init__(message)
        self.names, self.reason = names, reason


def _adaptive(methods: str | list[str]) -> bool:
    """Whether all methods choose their own steps."""
    return all(m in ADAPTIVE_METHODS for m in ([methods] if isinstance(methods, str) else methods))


def _kind(*kinds: str) -> Condition:
    """Whether the network is of a kind; a plug-in's may use every setting."""
    known = (*_WIDE, "linear")
    return lambda c: c.velocity.kind in kinds or c.velocity.kind not in known


def _objective(*objectives: str) -> Condition:
    return lambda config: config.train.objective in objectives


def _any_data(*names: str) -> Condition:
    """Whether the data set, or one that is joined to it, is among the names."""
    return lambda c: bool({c.data.name, *(n.split("/")[0] for n in c.data.also)} & set(names))


def _of_images(config: Config) -> bool:
    return config.data.name in IMAGE_SETS and config.data.name != LATENTS


#: kinds of networks that have a width
_FOLDERS = ("folder", "hf", "webdataset")
_WIDE = ("mlp", "resmlp", "conv", "unet", "dit")
#: key, whether it applies, and the condition in words
APPLIES: tuple[tuple[str, Condition, str], ...] = (
    ("data.size", _any_data(*_FOLDERS), "data.name=folder, hf or webdataset"),
    ("data.mode", _any_data(*_FOLDERS), "data.name=folder, hf or webdataset"),
    ("data.columns", _any_data("hf"), "data.name=hf"),
    ("data.limit", lambda c: _of_images(c) or c.data.name in TABLES,
     "data.name of images or of a table"),
    ("data.also", _of_images, "data.name of images"),
    ("latents.mirror", _of_images, "data.name of images"),
    (
        "data.path",
        lambda c: (
            c.data.name in (*IMAGE_SETS, "picture", *TABLES)
            and c.data.name not in ("mnist", "cifar10")
        ) or bool(c.data.also),
        "data.name=folder, hf, webdataset, npz, imagenet32, latents, picture or a table",
    ),
    ("autoencoder.size", lambda c: c.autoencoder.fit == "resize", "autoencoder.fit=resize"),
    ("train.preview_fid", lambda c: c.train.preview_every > 0, "train.preview_every"),
    ("latents.disturb", lambda c: c.velocity.image_channels > 0, "velocity.image_channels"),
    ("velocity.width", _kind(*_WIDE), "any velocity.kind but linear"),
    ("velocity.depth", _kind(*_WIDE), "any velocity.kind but linear"),
    ("velocity.activation", _kind(*_WIDE), "any velocity.kind but linear"),
    ("velocity.time_features", _kind(*_WIDE[1:]), "velocity.kind=resmlp, conv, unet or dit"),
    ("velocity.heads", _kind("unet", "dit"), "velocity.kind=unet or dit"),
    ("velocity.patch", _kind("unet", "dit"), "velocity.kind=unet or dit"),
    (
        "velocity.class_dropout",
        lambda c: c.velocity.classes > 0,
        "velocity.classes above 0",
    ),
    (  # the difference of two evaluations is below bfloat16's rounding
        "train.precision",
        lambda c: c.jko is None or c.jko.divergence != "finite-difference",
        "train.objective=lfm or fm, or jko with jko.divergence=hutchinson or exact",
    ),
    ("train.warm_start", _objective("jko", "lfm", "distill"), "train.objective=jko or lfm"),
    ("jko.jacobian_weight", lambda c: c.jko is None or c.jko.divergence == "finite-difference",
     "jko.divergence=finite-difference"),
    ("jko.solver.steps", lambda c: c.jko is None or not _adaptive(c.jko.solver.method),
     "a fixed-grid jko.solver.method"),
    (
        "jko.later_iterations",
        lambda c: c.jko is None or c.jko.reparameterize > 0 or c.jko.refine > 1,
        "jko.reparameterize above 0 or jko.refine above 1",
    ),
    ("sampler.steps", lambda c: not _adaptive(c.sampler.method), "a fixed-grid sampler.method"),
    (
        "generate.guidance",
        lambda c: c.velocity.classes > 0 or c.generate.guide is not None,
        "velocity.classes above 0 or a generate.guide",
    ),
)  # fmt: skip


def shown(value: object) -> str:
    """Return a value as a file has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def value_of(config: Any, name: str) -> Any:  # noqa: ANN401
    """Return the value of a dotted key; None in a section that does not apply."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def check_applicable(config: Any) -> None:  # noqa: ANN401 - other schemas have no such keys
    """Refuse settings that have no effect and are not at their default.

    Raises:
        InapplicableError: names the key, its value and the condition.
    """
    if not isinstance(config, Config):
        return
    known = keys(Config)
    for name, condition, words in APPLIES:
        value, default = value_of(config, name), known[name].default
        if value is not None and value != default and not condition(config):
            reason = f"{name}={shown(value)} applies to {words}"
            deciding = next(word for word in re.findall(r"[a-z_.]+", words) if word in known)
            raise InapplicableError(
                f"{reason}; this configuration has {deciding}="
                f"{shown(value_of(config, deciding))}; change that, or remove {name} "
                f"(default {shown(default)})",
                [name],
                reason,
            )
