"""The rehearsal of a launch on several machines: two nodes of two ranks, with torchrun's real
rendezvous, train at TP2 x DP2 over gloo, with vLLM engines in their processes.

The nodes are namespaces of this machine (namespaces.py). Most of the time here is imports: four
processes share what cores there are.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from namespaces import CABLE, Node, two_nodes, why_no_namespaces
from processes import REPOSITORY, Process
from safetensors.torch import load_file
from slurm_cluster import slurm, why_no_slurm

from megatron_mmr1.data.digits import build_digits
from megatron_mmr1.observability.metrics import read_metrics
from megatron_mmr1.observability.rollouts import read_rollouts

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

NUM_STEPS = 4
LAYOUT = ("parallel.tp_size=2", "rollout.tp_size=2")
LIMIT_S = 600


@dataclass(frozen=True)
class Rehearsal:
    """Two nodes, and a folder that both share."""

    folder: Path
    nodes: list[Node]

    def dir(self, run: str) -> Path:
        return self.folder / "digits" / run

    def arguments(self, run: str, *overrides: str) -> list[str]:
        return [
            *(f"output_dir={self.folder}", f"run={run}"),
            f"model.path={self.folder / 'digits_sft' / 'cold' / 'hf'}",
            f"data.train={self.folder / 'train.parquet'}",
            f"data.heldout={self.folder / 'heldout.parquet'}",
            *(f"num_steps={NUM_STEPS}", "prompts_per_step=8", "rollout.group_size=4"),
            *("max_tokens_per_microbatch=256", "optimizer.lr=1e-4"),
            *("evaluation.every=0", "checkpoint.every=1", "sampler.update_every=2"),
            *overrides,
        ]

    def start(self, number: int, script: str, run: str, *overrides: str) -> Process:
        """One node's part of a run: two of the four ranks; output in the folder, for people.

        The c10d rendezvous is on the second node; ranks 0 and 1 on the first: torchrun sorts names.
        """
        node = self.nodes[number]
        host, port = (self.nodes[1], 29400) if script == "c10d" else (self.nodes[0], 29500)
        starts = len(list(self.folder.glob(f"{run}.{node.name}.*.out")))
        return node.start(
            self.folder / f"{run}.{node.name}.{starts}.log",
            f"examples/torchrun/{script}.sh",
            *self.arguments(run, *LAYOUT, *overrides),
            program="bash",
            NODES="2",
            NODE=str(number),
            RANKS_PER_NODE="2",
            ENDPOINT=f"{host.name}:{port}",
            PYTHON=sys.executable,
            PYTHONPATH=str(REPOSITORY),
        )

    def start_both(self, script: str, run: str, *overrides: str) -> list[Process]:
        return [self.start(number, script, run, *overrides) for number in (0, 1)]


@pytest.fixture(scope="module")
def rehearsal(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Rehearsal]:
    """With a model that answers in the right form now and then, so that rewards differ."""
    if missing := why_no_namespaces():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("rehearsal")
    build_digits(folder, num_heldout=8, num_train=40, num_demonstrations=200)
    Process(
        folder / "cold",
        *("-m", "megatron_mmr1.sft", f"output_dir={folder}", "run=cold"),
        *(f"model.path={tiny_model_dir}", f"data={folder / 'sft.parquet'}"),
        *("num_steps=45", "global_batch_size=16", "max_tokens_per_microbatch=1024"),
        *("optimizer.warmup_ratio=0.11",),
    ).wait().succeeded()
    with two_nodes(folder) as nodes:
        yield Rehearsal(folder, nodes)


@pytest.fixture(scope="module")
def engines(rehearsal: Rehearsal) -> Path:
    """A run with engines on both nodes; its rollouts are what the others train on."""
    for process in rehearsal.start_both("c10d", "engines"):
        process.wait(LIMIT_S).succeeded()
    return rehearsal.dir("engines")


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    rows = [row for row in read_metrics(run_dir) if row["step"] > 0]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_two_nodes_with_engines_compute_what_one_process_computes(
    rehearsal: Rehearsal, engines: Path
):
    """Ours are real: engines agree with the trainer, and groups are mixed. Then, on the rollouts
    that they recorded, one process has the same losses and gradient norms at every step; bounds as
    in test_runs.py.
    """
    for row in read_metrics(engines)[1:]:
        assert row["logprob_diff/max"] < 1e-3 and row["rollout/responses"] == 32
    for step in range(1, NUM_STEPS + 1):
        rewards = [{r["reward"] for r in g["rollouts"]} for g in read_rollouts(engines, step)]
        assert sum(len(group) > 1 for group in rewards) >= 2
    one = rehearsal.arguments("one", f"replay={engines}")
    command = ("-m", "megatron_mmr1.train", *one)
    Process(rehearsal.folder / "one", *command).wait().succeeded()
    for two_nodes_, one_process in zip(
        numbers(engines), numbers(rehearsal.dir("one")), strict=True
    ):
        assert two_nodes_[0] == pytest.approx(one_process[0], rel=1e-6, abs=1e-6)
        assert two_nodes_[1] == pytest.approx(one_process[1], rel=1e-5)


def test_the_static_rendezvous_gives_the_same_numbers(rehearsal: Rehearsal, engines: Path):
    """Bit for bit: the ranks and their order are those of the other rendezvous."""
    for process in rehearsal.start_both("static", "static", f"replay={engines}"):
        process.wait(LIMIT_S).succeeded()
    assert numbers(rehearsal.dir("static")) == numbers(engines)


@pytest.mark.parametrize(
    "with_engines", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["replay", "engines"]
)
def test_a_node_that_is_killed_is_noticed_and_its_restart_resumes(
    rehearsal: Rehearsal, engines: Path, with_engines: bool
):
    """All processes of the node with rank 0 are killed at once, after the first checkpoint. The
    other node notices by itself; the same command is started again on the killed one; the run ends
    as one that nothing interrupted, bit for bit.
    """
    run = "cut_engines" if with_engines else "cut"
    overrides = () if with_engines else (f"replay={engines}",)
    lost, survivor = rehearsal.start_both("c10d", run, *overrides)
    checkpoints = rehearsal.dir(run) / "checkpoints"
    wait_for(lambda: (checkpoints / "step_1").exists(), [lost, survivor])
    lost.kill()
    killed = time.monotonic()
    errors = rehearsal.folder / f"{run}.gpu-02.0.err"
    wait_for(lambda: "failed (exitcode" in errors.read_text(), [survivor])
    noticed = time.monotonic()
    last = max(int(f.name.removeprefix("step_")) for f in checkpoints.glob("step_*"))
    assert last < NUM_STEPS, "it was killed too late"
    both = [rehearsal.start(0, "c10d", run, *overrides), survivor]
    wait_for(lambda: (checkpoints / f"step_{last + 1}").exists(), both)
    recovered = time.monotonic()
    for process in both:
        process.wait(LIMIT_S).succeeded()
    print(
        f"{run}: killed at step {last}; noticed after {noticed - killed:.1f} s; a new step "
        f"{recovered - noticed:.1f} s after the node was started again"
    )
    assert numbers(rehearsal.dir(run)) == numbers(engines)
    ours, theirs = (
        load_file(d / "hf" / "model.safetensors") for d in (rehearsal.dir(run), engines)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.slow
def test_slurm_starts_a_job_again_that_lost_a_node(rehearsal: Rehearsal, engines: Path):
    """A real Slurm on both nodes runs the script of examples/slurm. All processes of its second
    node are killed; Slurm puts the job into the queue again, where it waits for some two minutes
    and for the node; the job then ends as one that nothing interrupted, bit for bit.
    """
    if missing := why_no_slurm():
        pytest.skip(missing)
    folder = rehearsal.folder / "slurm"
    folder.mkdir()
    variables = f"RANKS_PER_NODE=2,GLOO_SOCKET_IFNAME={CABLE},PYTHON={sys.executable}"
    checkpoints = rehearsal.dir("by_slurm") / "checkpoints"
    with slurm(folder, rehearsal.nodes) as cluster:
        job = cluster.ask(
            *("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0"),
            *(f"--output={folder / 'job.log'}", f"--export=ALL,{variables}"),
            "examples/slurm/train.sbatch",
            *rehearsal.arguments("by_slurm", *LAYOUT, f"replay={engines}"),
        )
        wait_for(lambda: (checkpoints / "step_1").exists(), [])
        cluster.lose_node(rehearsal.nodes[1])
        lost = time.monotonic()
        wait_for(lambda: cluster.job(job, "Restarts") == "1", [])
        noticed = time.monotonic()
        last = max(int(f.name.removeprefix("step_")) for f in checkpoints.glob("step_*"))
        assert last < NUM_STEPS, "it was lost too late"
        cluster.start_node(rehearsal.nodes[1])
        wait_for(lambda: (checkpoints / f"step_{last + 1}").exists(), [])
        recovered = time.monotonic()
        wait_for(lambda: cluster.job(job, "JobState") == "COMPLETED", [])
    print(
        f"Slurm: lost at step {last}; in the queue again after {noticed - lost:.1f} s; a new step "
        f"{recovered - noticed:.1f} s after that"
    )
    assert numbers(rehearsal.dir("by_slurm")) == numbers(engines)


def wait_for(has_happened: Callable[[], bool], while_running: list[Process]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not has_happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        for process in while_running:
            assert process.is_running(), process.wait().succeeded()
        time.sleep(0.02)
