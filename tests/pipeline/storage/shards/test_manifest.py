"""The key of a store is a function of its identity."""

from __future__ import annotations

import pytest

from pipeline.storage.shards.manifest import content_key


def test_the_key_is_independent_of_the_order() -> None:
    assert content_key({"a": 1, "b": [2.5, None]}) == content_key({"b": [2.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    with pytest.raises(ValueError):
        content_key({"a": float("nan")})
