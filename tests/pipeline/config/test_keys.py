"""Every key has a meaning and a rule of resuming, and there are not too many."""

from __future__ import annotations

from pipeline.config.autoencoder import AutoencoderConfig
from pipeline.config.keys import RULES, count, keys, resume_rule
from pipeline.config.schema import Config


def test_rules_of_resuming() -> None:
    assert {resume_rule(name, Config) for name in keys(Config)} == set(RULES)
    for name, rule in (
        ("data.path", "moved"), ("data.test_split", "free"), ("velocity.width", "added"),
        ("velocity.classes", "fixed"), ("sampler.steps", "fixed"), ("jko.refine", "later"),
        ("train.max_minutes", "free"), ("generate.n", "free"), ("points.train", "fixed"),
    ):  # fmt: skip
        assert resume_rule(name, Config) == rule, name


def test_every_key_has_a_meaning() -> None:
    for schema in (Config, AutoencoderConfig):
        assert all(key.meaning for key in keys(schema).values())
    assert count(Config, AutoencoderConfig) <= 115
