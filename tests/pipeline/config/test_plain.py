"""Configurations as plain values survive YAML, and their differences are named by keys."""

from __future__ import annotations

import yaml

from pipeline.config.load import load_config
from pipeline.config.plain import differences, to_dict, with_values


def test_dicts_are_plain() -> None:
    plain = to_dict(load_config("smoke"))
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_differences_and_new_values() -> None:
    old, new = load_config("mnist"), load_config("demo")
    assert differences(old, new) == {"name": ("mnist", "demo"), "evaluate.n": (10000, 2000)}
    changed = with_values(old, {"jko.refine": 3, "data.limit": 5})
    assert changed.jko is not None and changed.jko.refine == 3 and changed.data.limit == 5
    assert set(differences(old, changed)) == {"jko.refine", "data.limit"}
