"""A seeded subset of the faults of `make test-faults`."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path

import pytest

from pipeline.storage import seal
from tests.faults import damages
from tests.faults.kills import kill
from tests.faults.mistakes import trying
from tests.faults.power import cut
from tests.faults.races import race
from tests.faults.strangers import reading
from tests.faults.strangers.pickles import pickles
from tests.faults.table import Table
from tests.pipeline.tiny import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JKOFLOW_HOME", "replaced by build")
        return damages.build(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture(autouse=True)
def home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JKOFLOW_HOME", str(world.home))


def test_every_damage_is_noticed_or_harmless(world: World) -> None:
    table = Table()
    damages.corrupt(world, 150, seed=1, table=table)
    assert table.total("silent") == 0
    assert table.total("noticed") > 100


def test_without_the_seal_damage_is_silent(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail."""
    monkeypatch.setattr(seal, "check", lambda *_: None)
    table = Table()
    damages.corrupt(world, 60, seed=1, table=table)
    assert table.total("silent") > 20


def test_a_repair_alone_leads_to_the_same_bytes(world: World) -> None:
    table = Table()
    damages.mend(world, table)
    assert table.total("not mended") == 0 and table.total("mended") == 36


@pytest.mark.slow
def test_killed_chains_end_in_the_same_bytes(tmp_path: Path) -> None:
    table = Table()
    kill(tmp_path, 24, 0, table)
    assert table.total("differences") == 0 and table.total("kills") >= 24
    assert table.total("temporaries left") == 0


@pytest.mark.slow
def test_without_the_seal_killed_and_damaged_chains_differ(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    table = Table()
    kill(tmp_path, 12, 1, table, unsealed=True, only=("encode", "train", "generate"))
    assert table.total("differences") > 0


def test_two_processes_take_turns(tmp_path: Path) -> None:
    table = Table()
    race(tmp_path, 1, table, only=("encode", "train"))
    assert table.total("other end") == table.total("differences") == 0
    assert table.counts["two configurations"]["second refused"] == 1


@pytest.mark.slow
def test_chains_go_on_after_power_cuts(tmp_path: Path) -> None:
    table = Table()
    cut(tmp_path, 20, 0, table)
    assert table.total("differences") == table.total("does not go on") == 0


@pytest.mark.slow
def test_without_syncing_power_cuts_leave_differences(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    table = Table()
    cut(tmp_path, 6, 0, table, only=("encode", "train"), sync=False)
    assert table.total("differences") > 0


def test_mistakes_are_one_sentence(world: World, tmp_path: Path) -> None:
    table = Table()
    trying.mistake(tmp_path / "x", 25, 3, world, world.root / "run", table)
    assert table.total("one sentence") == table.total("commands") == 25


def test_malicious_files_do_no_harm(world: World, tmp_path: Path) -> None:
    table = Table()
    reading.read_all(tmp_path / "x", 20, 3, world, table)
    assert table.total("harmless") == table.total("files") == 20


def test_a_payload_that_runs_is_noticed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above could not fail."""
    monkeypatch.setattr(reading, "readers_of", lambda kind, path: [lambda: pickle.loads(
        path.read_bytes()
    )])  # fmt: skip
    monkeypatch.setattr(reading, "FORKSERVER", multiprocessing.get_context("fork"))
    monkeypatch.setattr(reading, "strangers", lambda canary: [
        x for x in pickles(canary) if x.name in ("os system called", "eval in a value")
    ])  # fmt: skip
    table = Table()
    reading.read_all(tmp_path / "x", 20, 3, world, table, say=lambda _: None)
    assert table.total("payload ran") == 2
