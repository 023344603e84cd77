"""Heartbeats: a rank that dies or fails ends the others, and one rank says why."""

from __future__ import annotations

import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from pipeline.errors import UserError
from pipeline.runtime.heartbeat import Heartbeat, death, is_broken_connection
from tests.pipeline.tiny import ROOT, World, make_world, run_child, write_pictures

BEAT, SILENCE = 0.02, 1.5
HOST = platform.node()


class Ranks:
    """Heartbeats of several ranks on one store; `ended` receives (rank, sentence, code)."""

    def __init__(self, ranks: int) -> None:
        store = HashStore()
        self.ended: queue.Queue[tuple[int, str, int]] = queue.Queue()

        def end(rank: int) -> Callable[[str, int], object]:
            return lambda sentence, code: self.ended.put((rank, sentence, code))

        self.beats = [
            Heartbeat(store, rank, ranks, end(rank), BEAT, SILENCE) for rank in range(ranks)
        ]

    def stop(self, rank: int) -> None:
        """Let a rank die, without a farewell."""
        self.beats[rank]._ended.set()
        self.beats[rank]._thread.join()

    def wait(self, count: int) -> list[tuple[int, str, int]]:
        return sorted(self.ended.get(timeout=30) for _ in range(count))


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    for rank in range(3):
        ranks.stop(rank)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_silent_rank_ends_the_others_by_its_name(three: Ranks, dead: int) -> None:
    """Rank 0 finds the others; each of the others finds rank 0, and one writes the verdict."""
    three.stop(dead)
    sentence = death(dead, HOST)
    assert sentence.startswith(f"rank {dead} on {HOST} has died")
    assert three.wait(2) == [(rank, sentence, 1) for rank in range(3) if rank != dead]


def test_a_failed_rank_ends_the_others_with_its_code(three: Ranks) -> None:
    three.beats[1].leave("the disk is full", 2)
    assert three.wait(2) == [(0, "the disk is full", 2), (2, "the disk is full", 2)]
    assert [beat.claim() for beat in three.beats] == [True, False, False]  # one of them prints


def test_a_finished_rank_is_not_a_dead_one(three: Ranks) -> None:
    for rank in (0, 2):
        three.beats[rank].leave()
    time.sleep(2 * SILENCE)
    assert three.ended.empty()
    three.beats[1].leave()
    three.beats[0].linger()


def test_errors_of_broken_connections_are_known() -> None:
    gloo = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:9930: Connection reset by peer")
    assert is_broken_connection(gloo)
    assert not is_broken_connection(RuntimeError("shape [2] is invalid"))
    assert not is_broken_connection(UserError("the connection was closed by peer"))
    assert not is_broken_connection(OSError("Connection reset by peer"))


# ------------------------------------------------------------------------ two real processes


def start_pair(worlds: list[World], configs: list[str], *words: str | Path) -> list[Any]:
    """Start two ranks of a command as srun does, without a launcher that ends them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    pair = []
    for rank, (world, config) in enumerate(zip(worlds, configs, strict=True)):
        environment = {
            **os.environ, **world.environment, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        }  # fmt: skip
        command = [sys.executable, "-m", "pipeline", *map(str, words), "--config", config]
        pair.append(subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        ))  # fmt: skip
    return pair


def ends(pair: list[Any]) -> tuple[list[int], list[str]]:
    """The exit codes of two processes, and the lines of their errors."""
    texts = [process.communicate(timeout=120)[1] for process in pair]
    lines = [line for text in texts for line in text.splitlines() if line.startswith("error:")]
    return [process.returncode for process in pair], lines


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"))
    run_child("encode", "--config", world.config(), env=world.environment)
    return world


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_the_other(world: World, tmp_path: Path, dead: int) -> None:
    config = world.config(f"long-{dead}", train={"iterations": 10**6})
    log = tmp_path / "run" / "log.jsonl"
    pair = start_pair([world] * 2, [config] * 2, "train", "--run", tmp_path / "run")
    try:
        while not log.is_file() or not log.stat().st_size:
            assert all(process.poll() is None for process in pair)
            time.sleep(0.1)
        pair[dead].send_signal(signal.SIGKILL)
        codes, errors = ends(pair)
    finally:
        for process in pair:
            process.kill()
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 1
    assert errors == [f"error: {death(dead, HOST)}"]


@pytest.mark.slow
def test_a_batch_smaller_than_the_processes_is_one_sentence(world: World, tmp_path: Path) -> None:
    config = world.config("small", train={"batch_size": 1})
    pair = start_pair([world] * 2, [config] * 2, "train", "--run", tmp_path / "run")
    codes, (error,) = ends(pair)
    assert codes == [2, 2]
    assert "batch_size is 1; expected at least the number of processes (2)" in error


@pytest.mark.slow
@pytest.mark.parametrize("words", ["encode", "train"])
def test_a_rank_with_other_data_is_one_sentence(world: World, tmp_path: Path, words: str) -> None:
    """Every rank has the cache of its own data, as on machines without a shared disk."""
    other = World(world.root, dict(world.settings), tmp_path / "home")
    write_pictures(tmp_path / "pictures" / "train", 40, seed=3)
    changed = other.config("other", data={"path": str(tmp_path / "pictures")})
    run_child("encode", "--config", changed, env=other.environment)
    run = ["--run", tmp_path / "run"] if words == "train" else []
    pair = start_pair([world, other], [world.config(), changed], words, *run)
    codes, (error,) = ends(pair)
    assert codes == [2, 2]
    named = "the latent cache" if words == "encode" else "the key of the training samples"
    assert f"error: {named} of rank 1 is" in error and "as of rank 0" in error


@pytest.mark.slow
def test_an_error_of_one_rank_alone_is_one_sentence(world: World, tmp_path: Path) -> None:
    """Rank 1 has no cache, and rank 0 waits for it."""
    other = World(world.root, world.settings, tmp_path / "home")
    config = world.config("alone")
    pair = start_pair([world, other], [config] * 2, "train", "--run", tmp_path / "run")
    codes, (error,) = ends(pair)
    assert codes == [2, 2]
    assert "does not exist; run `jkoflow encode`" in error
