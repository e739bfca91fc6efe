"""Whole runs from the command line: exact resumption, two ranks against one, evaluation, refusals.

Real processes on a tiny scale, and few of them: most of a run's time here is imports. Independent
ones run two at a time.
"""

import json
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import relative_difference
from processes import LIMIT_S, Finished, Process
from safetensors.torch import load_file

from megatron_mmr1.data.digits import build_digits
from megatron_mmr1.observability.metrics import read_metrics
from megatron_mmr1.observability.prompt_stats import read_prompt_stats
from megatron_mmr1.observability.rollouts import read_rollouts

pytestmark = [pytest.mark.vllm, pytest.mark.distributed]

NUM_STEPS = 4


@dataclass(frozen=True)
class Runs:
    """Where everything lies, and how to start a run that differs in `overrides` only."""

    folder: Path

    @property
    def cold(self) -> Path:
        return self.folder / "digits_sft" / "cold"

    def dir(self, run: str) -> Path:
        return self.folder / "digits" / run

    def train(self, run: str, *overrides: str, ranks: int = 1, **environment: str) -> Process:
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
        command = (*launcher, "-m", "megatron_mmr1.train")
        return Process(
            self.folder / run,
            "-m",
            *(command if ranks > 1 else command[-1:]),
            f"output_dir={self.folder}",
            f"run={run}",
            f"model.path={self.cold / 'hf'}",
            f"data.train={self.folder / 'train.parquet'}",
            f"data.heldout={self.folder / 'heldout.parquet'}",
            f"num_steps={NUM_STEPS}",
            "prompts_per_step=8",
            "rollout.group_size=4",
            "max_tokens_per_microbatch=256",
            "optimizer.lr=1e-4",
            "evaluation.every=2",
            "evaluation.samples_per_prompt=1",
            "checkpoint.every=2",
            "sampler.update_every=2",  # so that a resumed run needs the sampler's state
            *overrides,
            **environment,
        )


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def cold_start(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Runs, Any]:
    """A model that answers in the right form now and then, so that rewards differ within groups.

    Beside it, what a run says that finds its port taken.
    """
    runs = Runs(tmp_path_factory.mktemp("runs"))
    build_digits(runs.folder, num_heldout=20, num_train=40, num_demonstrations=200)
    cold = Process(
        runs.folder / "cold",
        *("-m", "megatron_mmr1.sft", f"output_dir={runs.folder}", "run=cold"),
        *(f"model.path={tiny_model_dir}", f"data={runs.folder / 'sft.parquet'}"),
        *("num_steps=45", "global_batch_size=16", "max_tokens_per_microbatch=1024"),
        *("optimizer.warmup_ratio=0.11",),
    )
    with taken_port() as port:
        model = f"model.path={tiny_model_dir}"
        refused = runs.train("refused", model, MASTER_PORT=str(port)).wait()
    cold.wait().succeeded()
    return runs, (port, refused)


@pytest.fixture(scope="module")
def runs(cold_start: tuple[Runs, Any]) -> Runs:
    return cold_start[0]


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """A run that nothing interrupts; and "cut", the same one, killed after its first checkpoint."""
    cut, whole = runs.train("cut"), runs.train("whole")
    deadline = time.monotonic() + LIMIT_S
    while not (runs.dir("cut") / "checkpoints" / "step_2").exists():
        assert cut.is_running() and time.monotonic() < deadline, cut.wait().succeeded()
        time.sleep(0.01)
    cut.kill()
    whole.wait().succeeded()
    return runs.dir("whole")


@dataclass(frozen=True)
class Continued:
    resumed: Path
    evaluated: Finished
    responses: list[dict[str, Any]]


@pytest.fixture(scope="module")
def continued(runs: Runs, whole: Path) -> Continued:
    """The killed run, continued; and the whole run's model, evaluated as anybody would."""
    assert not (runs.dir("cut") / "hf").exists(), "it was killed too late"
    resumed = runs.train("cut", "resume=auto")
    output = runs.folder / "evaluation"
    evaluated = Process(
        runs.folder / "evaluate",
        *("-m", "megatron_mmr1.evaluate", "benchmark=digits", f"model={whole / 'hf'}"),
        *(f"data={runs.folder / 'heldout.parquet'}", "rollout.temperature=0"),
        f"output={output}",
    ).wait()
    resumed.wait().succeeded()
    evaluated.succeeded()
    lines = (output / "samples.jsonl").read_text().splitlines()
    return Continued(runs.dir("cut"), evaluated, [json.loads(line) for line in lines])


@dataclass(frozen=True)
class Replays:
    two_ranks: Path
    tensor_parallel: Path
    moved: dict[str, Path]  # the tensor-parallel run from step 2 on, at other layouts
    too_strict: Finished
    two_steps_a_batch: tuple[Path, Path]  # on one rank, and on two


@pytest.fixture(scope="module")
def replays(runs: Runs, whole: Path) -> Replays:
    """The whole run's rollouts again: on two ranks, at other layouts, with a bound that nothing can
    keep, and learnt from in two optimizer steps a batch with everything else that a step can have.
    """
    replay = f"replay={whole}"
    two_ranks = runs.train("two_ranks", replay, "rollout.takes_turns=false", ranks=2)
    cut = ["parallel.tp_size=2", "parallel.sequence_parallel=true", "parallel.recompute=full"]
    runs.train("tensor", replay, *cut, ranks=2).wait().succeeded()
    moved = {}
    for name, layout in (("pp2", "parallel.pp_size=2"), ("cp2", "parallel.cp_size=2")):
        shutil.copytree(runs.dir("tensor"), runs.dir(name))
        shutil.rmtree(runs.dir(name) / "checkpoints" / "step_4")
        again = (replay, f"run={name}", layout, "resume=auto")
        config = runs.dir(name) / "config.yaml"
        config.write_text(config.read_text().replace("run: tensor", f"run: {name}"))
        runs.train(name, *again, ranks=2).wait().succeeded()
        moved[name] = runs.dir(name)
    strict = runs.train("strict", replay, "rollout.max_logprob_diff=1e-12").wait()
    two_ranks.wait().succeeded()
    several = (
        *(replay, "num_steps=2", "algorithm.optimizer_steps_per_batch=2"),
        *("algorithm.kl_coefficient=0.1", "algorithm.aggregation=sequence_mean"),
        "rollout.max_logprob_diff=10",  # the recorded rollouts are of other weights from step 2 on
    )
    on_one = runs.train("several_one", *several)
    runs.train("several_two", *several, ranks=2).wait().succeeded()
    on_one.wait().succeeded()
    both = runs.dir("several_one"), runs.dir("several_two")
    return Replays(runs.dir("two_ranks"), runs.dir("tensor"), moved, strict, both)


def test_a_run_leaves_its_records_and_its_report(whole: Path):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "prompt_stats.parquet",
        "rollouts",
        "checkpoints",
        "hf",
        "report.html",
    }
    rows = read_metrics(whole)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert [row["step"] for row in rows if "eval/accuracy_greedy" in row] == [0, 2, 4]
    assert len(list((whole / "rollouts").glob("step_*.jsonl"))) == NUM_STEPS
    report = (whole / "report.html").read_text()
    assert "accuracy" in report
    assert f"{100 * rows[-1]['eval/accuracy_greedy']:.1f}" in report


def num_groups_with_a_gradient(run_dir: Path, step: int) -> int:
    """Groups whose rewards differ: only these have advantages."""
    return sum(is_mixed(group) for group in read_rollouts(run_dir, step))


def is_mixed(group: dict[str, Any]) -> bool:
    return len({r["reward"] for r in group["rollouts"]}) > 1


def test_a_run_learns_from_its_rollouts(runs: Runs, whole: Path):
    """Guards the comparisons below: they would hold of a run in which nothing happens."""
    # With three of them gradients are added in another order on two ranks than on one.
    assert all(num_groups_with_a_gradient(whole, step) >= 3 for step in (1, 2, 3, 4))
    rows = read_metrics(whole)[1:]
    assert any(row["grad_norm"] > 0.01 for row in rows)
    assert all(row["logprob_diff/max"] < 1e-3 for row in rows)  # as in test_engine.py
    start, end = (load_file(f / "hf" / "model.safetensors") for f in (runs.cold, whole))
    assert any(relative_difference(end[name], start[name]) > 1e-4 for name in start)


def test_a_killed_run_continues_as_if_nothing_had_happened(continued: Continued, whole: Path):
    """Bit for bit: everything that later steps depend on is in the checkpoint."""

    def lasting(run_dir: Path) -> list[dict[str, Any]]:
        timings = ("time/", "rollout/tokens_per_s")
        rows = read_metrics(run_dir)
        return [{k: v for k, v in row.items() if not k.startswith(timings)} for row in rows]

    resumed = continued.resumed
    assert lasting(resumed) == lasting(whole)
    for file in sorted((whole / "rollouts").iterdir()):
        assert (resumed / "rollouts" / file.name).read_bytes() == file.read_bytes(), file.name
    stats, expected = read_prompt_stats(resumed), read_prompt_stats(whole)
    assert len(expected["step"]) > 0
    for column in expected:
        np.testing.assert_array_equal(stats[column], expected[column], column)
    model = Path("hf") / "model.safetensors"
    assert (resumed / model).read_bytes() == (whole / model).read_bytes()


def test_two_ranks_compute_what_one_computes(replays: Replays, whole: Path):
    """On equal rollouts. The sums over sequences are added in another order, which float32 rounds.

    AdamW divides a gradient by its own size, so that the rounding of a tiny gradient comes back as
    large as the learning rate: weights are compared by the norm of each tensor. The advantages of a
    group sum to zero, so the loss is close to zero: its bound is in units of its terms, of order 1.
    """
    assert_same_training(replays.two_ranks, whole)


def test_tensor_parallel_ranks_compute_what_one_computes(replays: Replays, whole: Path):
    assert_same_training(replays.tensor_parallel, whole)


def test_twenty_replayed_steps_by_the_kernels_and_by_the_definition_give_the_same_weights(
    runs: Runs,
):
    """Through the tool, which holds them against its tolerance; another loss does not keep it."""
    rare = ("num_steps=20", "evaluation.every=0", "checkpoint.every=0", "prompts_per_step=4")
    runs.train("twenty", *rare).wait().succeeded()
    recorded, report = runs.dir("twenty"), runs.folder / "loss_paths.json"
    assert sum(num_groups_with_a_gradient(recorded, step) > 0 for step in range(1, 21)) > 10
    other = ("algorithm.advantage_scale=none", "rollout.max_logprob_diff=10")
    unscaled = runs.train("unscaled", *rare, f"replay={recorded}", *other)
    tool = ("tools/compare_loss_paths.py", str(recorded), "--steps", "20", "--turns", "1")
    Process(runs.folder / "loss_paths", *tool, "--json", str(report)).wait().succeeded()
    unscaled.wait().succeeded()
    result = json.loads(report.read_text())
    assert result["steps"] == 20 and result["largest weight difference"] <= 1e-4
    models = (load_file(runs.dir(n) / "hf" / "model.safetensors") for n in ("twenty", "unscaled"))
    right, wrong = models
    assert max(relative_difference(wrong[name], right[name]) for name in right) > 1e-2


@pytest.mark.parametrize("name", ["pp2", "cp2"])
def test_a_run_goes_on_at_another_layout(replays: Replays, whole: Path, name: str):
    """Saved at TP2 + SP, resumed at PP2 or CP2: the same losses, weights and draws."""
    assert_same_training(replays.moved[name], whole)


def assert_same_training(run_dir: Path, whole: Path) -> None:
    ours, theirs = read_metrics(run_dir), read_metrics(whole)[1:]
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for two, one in zip(ours, theirs, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6, abs=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        assert two["entropy/mean"] == pytest.approx(one["entropy/mean"], rel=1e-5)
        for key in ("reward/mean", "groups/mixed_rate", "tokens/response", "lr"):
            assert two[key] == one[key], key
    two, one = (load_file(d / "hf" / "model.safetensors") for d in (run_dir, whole))
    worst = max(relative_difference(two[name], one[name]) for name in one)
    assert worst <= 1e-4
    stats, expected = read_prompt_stats(run_dir), read_prompt_stats(whole)
    for column in expected:
        np.testing.assert_array_equal(stats[column], expected[column], column)


@pytest.mark.parametrize(
    ("name", "ranks", "layout"),
    [
        ("engine_of_2", 2, ["parallel.tp_size=2", "parallel.sequence_parallel=true"]),
        ("engines_on_4", 4, ["parallel.tp_size=2", "parallel.pp_size=2"]),
    ],
)
def test_an_engine_of_two_ranks_samples_what_one_process_samples(
    runs: Runs, whole: Path, name: str, ranks: int, layout: list[str]
):
    """One engine of two ranks, and two of them that share the draw; weights come from the policy's
    own layout. Another order of additions may tip a sample now and then: hence nine in ten.
    """
    live = runs.train(name, "num_steps=1", "rollout.tp_size=2", *layout, ranks=ranks)
    live.wait().succeeded()
    start, step = read_metrics(runs.dir(name))
    expected_start, expected_step = read_metrics(whole)[:2]
    assert start["eval/accuracy_greedy"] == pytest.approx(
        expected_start["eval/accuracy_greedy"], abs=0.051
    )
    assert step["logprob_diff/max"] < 1e-3 and step["logprob_diff/mean"] < 1e-4
    assert step["rollout/responses"] == expected_step["rollout/responses"]
    ours, theirs = (read_rollouts(d, 1) for d in (runs.dir(name), whole))
    assert [g["prompt_id"] for g in ours] == [g["prompt_id"] for g in theirs]
    assert all(a["images"] == b["images"] for a, b in zip(ours, theirs, strict=True))
    same = [
        a["token_ids"] == b["token_ids"]
        for one, two in zip(ours, theirs, strict=True)
        for a, b in zip(one["rollouts"], two["rollouts"], strict=True)
    ]
    assert sum(same) >= 0.9 * len(same)
    # What it exports after the step is what the engine holds, and what anybody can load.
    assert (runs.dir(name) / "hf" / "model.safetensors").exists()


def test_two_ranks_take_the_same_several_steps_a_batch(replays: Replays):
    """With frozen old log-probs, a reference model and sequence-mean; bounds as above."""
    on_one, on_two = replays.two_steps_a_batch
    for two, one in zip(read_metrics(on_two), read_metrics(on_one), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6, abs=1e-6)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-6)
        assert two["kl/mean"] == pytest.approx(one["kl/mean"], rel=1e-4, abs=1e-9)
    assert read_metrics(on_one)[-1]["kl/mean"] > 0
    two, one = (load_file(d / "hf" / "model.safetensors") for d in (on_two, on_one))
    assert max(relative_difference(two[name], one[name]) for name in one) <= 1e-5


def test_evaluate_agrees_with_the_runs_own_last_evaluation(continued: Continued, whole: Path):
    """Also: vLLM serves the folder that the run wrote."""
    outcomes = [sample["strict"]["outcome"] for sample in continued.responses]
    assert len(outcomes) == 20
    expected = read_metrics(whole)[-1]["eval/accuracy_greedy"]
    assert outcomes.count("correct") / len(outcomes) == expected
    assert f"{expected:.1%}" in continued.evaluated.stdout


def test_dynamic_sampling_on_two_engines_keeps_to_its_budget(runs: Runs):
    """Refills are dealt to both engines, however small; a finished run that is resumed is over."""
    budget = ("sampler=dapo", "max_responses=200", "checkpoint.every=1", "evaluation.every=0")
    runs.train("dapo", *budget, ranks=2).wait().succeeded()
    rows = read_metrics(runs.dir("dapo"))[1:]
    assert sum(row["rollout/refills"] for row in rows) > 0
    assert rows[-1]["rollout/responses_total"] <= 200 < rows[-1]["rollout/responses_total"] + 8 * 4
    total = 0
    for row in rows:
        groups = read_rollouts(runs.dir("dapo"), row["step"])
        trained = [g for g in groups if not g["is_discarded"]]
        assert len(trained) == 8
        assert row["rollout/discarded_responses"] == 4 * (len(groups) - 8)
        total += 4 * len(groups)
        assert row["rollout/responses_total"] == total
        mixed, equal = ([g for g in groups if is_mixed(g) is kind] for kind in (True, False))
        if len(mixed) >= 8:
            assert all(is_mixed(g) for g in trained)
        else:
            assert all(g in trained for g in mixed) and len(equal) >= 8 - len(mixed)
    runs.train("dapo", *budget, "resume=auto", ranks=2).wait().succeeded()
    assert read_metrics(runs.dir("dapo"))[1:] == rows


def test_scoring_rollouts_count_and_are_not_trained_on(runs: Runs):
    paper = ("sampler=paper_table_6", "sampler.scoring_rollouts=2", "sampler.update_every=2")
    runs.train("paper", *paper, "num_steps=3", "evaluation.every=0").wait().succeeded()
    rows = read_metrics(runs.dir("paper"))[1:]
    assert [row["rollout/scoring_responses"] for row in rows] == [2 * 40, 0, 2 * 40]
    assert [row["rollout/responses_total"] for row in rows] == [112, 144, 256]
    assert len(read_rollouts(runs.dir("paper"), 1)) == 8
    table = read_prompt_stats(runs.dir("paper"))
    assert (~np.isnan(table["pass_rate"])).all() and set(table["step"]) == {1, 3}
    refused = runs.train("small", *paper, "max_responses=100").wait()
    assert refused.returncode != 0
    assert "max_responses=100 has no room for one step, which takes 112 responses" in refused.stderr


def test_logprobs_that_differ_too_much_stop_the_run(replays: Replays):
    stopped = replays.too_strict
    assert stopped.returncode != 0
    assert "above rollout.max_logprob_diff=1e-12" in stopped.stderr


def test_a_port_in_use_is_one_clear_message(cold_start: tuple[Runs, Any]):
    _, (port, refused) = cold_start
    assert refused.returncode == 2
    assert f"error: MASTER_PORT={port} is in use" in refused.stderr
    assert "Traceback" not in refused.stderr
