"""Keys of earlier versions are named with their new place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import keys
from pipeline.config.load import load_config, read_resolved
from pipeline.config.rules.moved import GONE, MOVED, replacement
from pipeline.config.schema import Config
from pipeline.errors import UserError


def test_old_keys_are_named_with_their_new_place(tmp_path: Path) -> None:
    known = keys(Config)
    sections = {name.partition(".")[0] for name in known}
    for old in (*MOVED, *GONE):
        assert old not in known and replacement(old), old
        assert not old.endswith(".*") or old.removesuffix(".*") not in sections
    assert all(new in known for new in MOVED.values() if " " not in new and "," not in new)
    own = keys(AutoencoderConfig)
    assert not set(own) & (set(MOVED) | set(GONE))
    for key, said in (
        ("push.steps=3", "push.steps is now sampler.steps; rename it"),
        ("solver.rtol=3", "solver.rtol is no setting here: adaptive solvers always have"),
        ("jko.rho=2", "jko.rho is now schedule.rho; rename it"),
        ("jko.eta=0.3", "jko.eta is no setting here: a later pass always goes half of the way"),
        ("architecture.ch=64", "architecture.ch is no setting here: it belongs to an autoencoder"),
        ("velocity.hidden=[4]", "velocity.hidden is now velocity.width and velocity.depth"),
    ):
        with pytest.raises(UserError, match=said.replace("[", r"\[")):
            load_config("smoke", [key])
    assert replacement("never.known") is None
    (tmp_path / "config.yaml").write_text("name: old\nschedule: {h0: 0.5}\n")
    with pytest.raises(UserError, match=r"config\.yaml: schedule\.h0 is now jko\.h0; rename it"):
        read_resolved(Config, tmp_path / "config.yaml")
