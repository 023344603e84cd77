"""docs/cluster: the jobs are sound, name commands that exist, and run on two launchers here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.pipeline.tiny import World, make_world, run_child
from tests.test_documents import JOBS, ROOT, check_configuration, mistakes, name_of

#: arguments of a job, and the jkoflow commands that it gives
CALLS = {
    "encode": (["mnist"], ["encode"]),
    "train": (["mnist", "RUN"], ["train", "train"]),
    "train-networks": (["mnist", "RUN"], ["train", "train"]),
    "evaluate": (["RUN", "-n", "100"], ["evaluate"]),
}
#: programs of a cluster, for two tasks on this machine
SRUN = """\
#!/bin/bash
"$@" & first=$!
"$@" & second=$!
code=0; wait $first || code=$?; wait $second || code=$?
exit $code
"""


def write_program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_job(
    job: Path, folder: Path, words: list[str | Path], **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a job with the programs in a folder, as Slurm does."""
    return subprocess.run(
        ["bash", str(job), *map(str, words)],
        env={
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURM_NNODES": "2",
            "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_TASK_ID": "0",
            **environment,
        },
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize("job", JOBS, ids=name_of)
def test_jobs_are_sound(job: Path) -> None:
    text = job.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(job, os.X_OK)
    subprocess.run(["bash", "-n", str(job)], check=True)
    head, _, body = text.partition("set -euo pipefail")
    assert "\n#SBATCH --requeue\n" in head and "#SBATCH" not in body  # Slurm stops at a command
    if job.stem.startswith("train"):  # the wall time is longer than the default of MINUTES
        hours = int(head.partition("--time=")[2][:2])
        assert int(body.partition("MINUTES:-")[2].partition("}")[0]) < 60 * hours - 10


@pytest.mark.parametrize("job", JOBS, ids=name_of)
def test_commands_of_jobs_exist(job: Path, tmp_path: Path) -> None:
    """The programs write down their arguments; a finished training is not requeued."""
    words, verbs = CALLS[job.stem]
    calls, requeued = tmp_path / "calls", tmp_path / "requeued"
    note = f'printf "%s\\n" "$@" -- >> "{calls}"'
    write_program(tmp_path, "srun", '#!/bin/sh\nexec "$@"\n')
    scontrol = f'#!/bin/sh\nif [ "$1" = show ]; then echo node1; else touch "{requeued}"; fi\n'
    write_program(tmp_path, "scontrol", scontrol)
    skip = 'while [ "$1" != jkoflow ]; do shift; done; shift'
    write_program(tmp_path, "torchrun", f"#!/bin/sh\n{skip}\n{note}\n")
    write_program(tmp_path, "jkoflow", f'#!/bin/sh\n{note}\necho "${{STATE:-run is finished}}"\n')
    done = run_job(job, tmp_path, list(words), JKOFLOW_HOME="home")
    assert done.returncode == 0, done.stderr
    given = [call.splitlines() for call in calls.read_text().split("--\n") if call]
    assert [call[0] for call in given] == verbs
    for call in given:
        assert mistakes(list(call)) == []
        check_configuration(call)
    assert not requeued.exists()
    run_job(job, tmp_path, list(words), JKOFLOW_HOME="home", STATE="train 3 block(s)")
    assert requeued.exists() == job.stem.startswith("train")
    assert run_job(job, tmp_path, list(words), JKOFLOW_HOME="").returncode != 0


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with the programs of a cluster of two machines, which are this one."""
    write_program(tmp_path, "srun", SRUN)
    noted = f'echo "$2" >> "{tmp_path}/requeued"'
    scontrol = f'#!/bin/sh\nif [ "$1" = show ]; then echo 127.0.0.1; else {noted}; fi\n'
    write_program(tmp_path, "scontrol", scontrol)
    start = f'#!/bin/sh\nexec "{sys.executable}" -m'
    write_program(tmp_path, "torchrun", f'{start} torch.distributed.run "$@"\n')
    write_program(tmp_path, "jkoflow", f'{start} pipeline "$@"\n')
    return tmp_path


@pytest.mark.slow
def test_jobs_run_on_two_launchers(cluster: Path) -> None:
    """Encode; train until the time is up, twice, then to the end; each job is a real one."""
    world: World = make_world(cluster)
    config, run = world.config(train={"checkpoint_seconds": 0}), cluster / "run"
    jobs = {job.stem: job for job in JOBS}

    def submit(name: str, *words: str | Path, **environment: str) -> str:
        environment |= {**world.environment, "PROCESSES": "1", "PORT": free_port()}
        done = run_job(jobs[name], cluster, list(words), **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    submit("encode", config)
    assert len(world.caches()) == 1
    requeued = cluster / "requeued"
    assert "stopped in time" in submit("train", config, run, MINUTES="1e-9")
    assert requeued.read_text() == "17\n"
    assert "3 blocks, 3 trained now: finished" in submit("train", config, run)
    assert requeued.read_text() == "17\n"  # not again
    rows = json.loads((run / "flow.json").read_text())["passes"][0]["blocks"]
    assert len(rows) == 3


@pytest.mark.slow
def test_networks_train_in_an_array_of_jobs(cluster: Path) -> None:
    """Two tasks at once, stopped in time and submitted again; a third job joins the networks."""
    world = make_world(cluster)
    recipe = {"objective": "fm", "checkpoint_seconds": 0}
    config, run = world.config(train=recipe, velocity={"nets": 2}), cluster / "run"
    jobs = {job.stem: job for job in JOBS}
    write_program(cluster, "srun", '#!/bin/sh\nexec "$@"\n')  # a task of an array has one machine

    def submit(name: str, task: int = 0, **environment: str) -> str:
        environment |= {**world.environment, "PROCESSES": "1", "PORT": free_port()}
        environment["SLURM_ARRAY_TASK_ID"] = str(task)
        done = run_job(jobs[name], cluster, [config, run], **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def submit_array(**environment: str) -> list[str]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda j: submit("train-networks", j, **environment), range(2)))

    run_child("encode", "--config", config, env=world.environment)
    requeued = cluster / "requeued"
    assert all("stopped in time" in text for text in submit_array(MINUTES="1e-9"))
    assert requeued.read_text() == "17\n17\n"
    for network, text in enumerate(submit_array()):
        assert f"network {network}: finished" in text
    write_program(cluster, "srun", SRUN)
    assert "1 blocks, 1 trained now: finished" in submit("train")
    assert requeued.read_text() == "17\n17\n"  # not again
    (row,) = json.loads((run / "flow.json").read_text())["passes"][0]["blocks"]
    assert row["iterations"] == 6


@pytest.mark.slow
def test_two_launchers_with_an_address_encode_together(tmp_path: Path) -> None:
    """The command line of docs/cluster.md for machines without Slurm."""
    world = make_world(tmp_path)
    port = free_port()
    agents = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--node_rank", str(rank), "--nproc_per_node", "1", "--master_addr", "127.0.0.1",
                "--master_port", port, "-m", "jkoflow", "encode", "--config", world.config(),
            ],
            env={**os.environ, **world.environment}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0]
    (cache,) = world.caches()
    assert "".join(outputs).split() == [str(cache)]
