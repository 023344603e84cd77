"""A seeded subset of the faults of `make test-faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.storage import seal
from tests import faults
from tests.pipeline.tiny import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JKOFLOW_HOME", "replaced by build")
        return faults.build(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(autouse=True)
def home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))


def test_every_damage_is_noticed_or_harmless(world: World) -> None:
    table = faults.Table()
    faults.corrupt(world, 150, seed=1, table=table)
    assert table.total("silent") == 0
    assert table.total("noticed") > 100


def test_without_the_seal_damage_is_silent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    monkeypatch.setattr(seal, "check", lambda *_: None)
    table = faults.Table()
    faults.corrupt(world, 60, seed=1, table=table)
    assert table.total("silent") > 20


def test_the_advice_leads_to_the_same_bytes(world: World) -> None:
    table = faults.Table()
    faults.mend(world, table)
    assert table.total("not mended") == 0 and table.total("mended") > 10


@pytest.mark.slow
def test_killed_chains_end_in_the_same_bytes(tmp_path: Path) -> None:
    table = faults.Table()
    faults.kill(tmp_path, 12, 0, table)
    assert table.total("differences") == 0 and table.total("kills") >= 12
