"""What the script of examples/slurm does besides training, on a real Slurm of two nodes: a small
program is in Python's place. tests/test_rehearsal.py trains with it.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import two_nodes, why_no_namespaces
from processes import REPOSITORY
from slurm_cluster import Cluster, slurm, why_no_slurm

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := why_no_namespaces() or why_no_slurm():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "daemons").mkdir()
    with two_nodes(folder) as nodes, slurm(folder / "daemons", nodes) as running:
        yield running


def submit(
    cluster: Cluster,
    folder: Path,
    *,
    training: str,
    settings: str = "exit 0",
    doctor: str = "exit 0",
    nodes: int = 2,
    **variables: str,
) -> tuple[str, Path]:
    """Submit the script with the shell commands that stand in; return the job and its log."""
    program, log = folder / "python", folder / "job.log"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = tools/check_settings.py ] && {{ {settings}; }}\n'
        f'[ "$1" = tools/doctor.py ] && {{ {doctor}; }}\n{training}\n'
    )
    program.chmod(0o755)
    given = "".join(f",{name}={value}" for name, value in variables.items())
    job = cluster.ask(
        *("sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", f"--output={log}"),
        f"--export=ALL,RANKS_PER_NODE=2,PYTHON={program}{given}",
        *("examples/slurm/train.sbatch", "experiment=any", "run=any"),
    )
    return job, log


def wait_for(has_happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not has_happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def test_each_node_gets_its_command_and_the_signal_puts_the_job_back(
    cluster: Cluster, tmp_path: Path
):
    """The signal is the one that Slurm sends before the time limit."""
    job, log = submit(cluster, tmp_path, training='echo "runs: $*"; sleep 300')
    wait_for(lambda: log.exists() and log.read_text().count("runs:") == 2)
    for line in (line for line in log.read_text().splitlines() if "runs:" in line):
        assert "--nnodes=2 --nproc-per-node=2" in line
        assert f"--rdzv-backend=c10d --rdzv-endpoint=gpu-01:{20000 + int(job)}" in line
        ours = f"-m megatron_mmr1.train run=slurm_{job} resume=auto experiment=any run=any"
        assert line.endswith(ours)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: cluster.job(job, "JobState") == "PENDING")  # after COMPLETING
    assert cluster.job(job, "Restarts") == "1"
    assert "the time limit is near: into the queue again" in log.read_text()
    cluster.ask("scancel", job)


def test_only_failures_use_up_the_starts_after_failures(cluster: Cluster, tmp_path: Path):
    """The time limit comes near, then the step fails twice: one more start was to be had."""
    training = f"[ -e {tmp_path}/late ] || {{ echo runs; sleep 300; }}; exit 1"
    job, log = submit(cluster, tmp_path, training=training, MAX_REQUEUES="1")
    failures = REPOSITORY / f".slurm_failures_{job}"
    wait_for(lambda: log.exists() and log.read_text().count("runs") == 2)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    for restarts in ("1", "2"):
        wait_for(lambda: cluster.job(job, "JobState") == "PENDING")  # after COMPLETING
        assert failures.exists() == (restarts == "2")
        (tmp_path / "late").touch()
        cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # not in two minutes
        wait_for(lambda expected=restarts: f"start {expected} of job" in log.read_text())
    wait_for(lambda: cluster.job(job, "JobState") == "FAILED")
    assert cluster.job(job, "Restarts") == "2" and not failures.exists()
    # The status of the one that failed first, or of the one that srun ended then.
    assert len(re.findall(r"exit status (?:1|143): into the queue again", log.read_text())) == 1


def test_settings_that_are_refused_cost_one_start(cluster: Cluster, tmp_path: Path):
    """The one look at them has all that the run gets; tests/test_launch_config.py has real ones."""
    refused = 'echo "looks at: $*"; exit 2'
    job, log = submit(cluster, tmp_path, settings=refused, training="echo started")
    wait_for(lambda: cluster.job(job, "JobState") == "FAILED")
    assert cluster.job(job, "Restarts") == "0"
    ours = f"train 2 2 run=slurm_{job} resume=auto experiment=any run=any"
    assert f"looks at: tools/check_settings.py {ours}\n" in log.read_text()
    assert "not started: mend the settings" in log.read_text()
    assert "started\n" not in log.read_text()


def test_one_node_is_asked_for_its_port_alone(cluster: Cluster, tmp_path: Path):
    """Its name may be 127.0.1.1 there, as Debian sets it, where two nodes could not meet."""
    asked = 'echo "asked: $*"; exit 0'
    job, log = submit(cluster, tmp_path, doctor=asked, training="exit 0", nodes=1)
    wait_for(lambda: cluster.job(job, "JobState") == "COMPLETED")
    assert f"asked: tools/doctor.py --port {20000 + int(job)}\n" in log.read_text()


def test_nothing_starts_where_the_doctor_finds_something_to_do(cluster: Cluster, tmp_path: Path):
    job, log = submit(cluster, tmp_path, doctor="echo DO port; exit 1", training="echo started")
    wait_for(lambda: cluster.job(job, "JobState") == "FAILED")
    assert cluster.job(job, "Restarts") == "0"
    assert "0: DO port" in log.read_text() and "1: DO port" in log.read_text()
    assert "not started" in log.read_text() and ": started" not in log.read_text()
