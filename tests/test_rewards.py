"""Rewards: the shape of a response, the rules of judgement, the pool that survives any answer."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_mmr1.config.schema import RewardConfig
from megatron_mmr1.observability.step_metrics import group_metrics, group_sums
from megatron_mmr1.rewards import VerifierPool, extract_answer, is_well_formed, score
from megatron_mmr1.types import Prompt, Rollout, RolloutGroup, ScoredGroup, ScoredRollout, Verdict


def respond(boxed: str) -> str:
    return f"<think>some thought</think>\n<answer>\\boxed{{{boxed}}}</answer>"


def make_group(gold: str, texts: list[str], prompt_id: str = "p") -> RolloutGroup:
    empty = torch.zeros(0, dtype=torch.int64)
    prompt = Prompt(prompt_id, empty, empty.reshape(3, 0), None, None, gold)
    rollouts = tuple(Rollout(i, (), (), "stop", text) for i, text in enumerate(texts))
    return RolloutGroup(prompt, rollouts, weight_version=0)


@pytest.mark.parametrize(
    "response",
    [
        "<think>a</think><answer>b</answer>",
        "  <think>a\nb</think>\n\n<answer>c</answer>\n",
        "<think></think><answer></answer>",
    ],
)
def test_one_think_block_then_one_answer_block_is_well_formed(response):
    assert is_well_formed(response)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think>a</think><answer>b",
        "hello <think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer> bye",
        "<think>a</think> so <answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think><think>a</think></think><answer>b</answer>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
    ],
)
def test_missing_nested_repeated_or_surrounded_blocks_are_not_well_formed(response):
    assert not is_well_formed(response)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<answer>\boxed{8}</answer>", "8"),
        (r"<answer>\boxed {8}</answer>", "8"),
        (r"<answer>\boxed{1}, no, \boxed{2}</answer>", "2"),
        (r"<answer>\boxed{\frac{1}{2}} cm</answer>", r"\frac{1}{2}"),
        (r"<answer>\boxed{\{1, 2\}}</answer>", r"\{1, 2\}"),
        (r"<think>\boxed{3}</think><answer>3</answer>", None),
        (r"\boxed{3}", None),
        (r"<answer>\boxed{3</answer>", None),
        (r"<answer>\boxed{3}", None),
    ],
)
def test_the_last_closed_box_inside_answer_is_the_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("5", "5.0"),
        ("1234", "1,234"),
        ("1234", r"1\,234"),
        ("0.5", r"50\%"),
        ("50%", "0.5"),
        (r"\frac{1}{2}", "50%"),
        ("5", r"5\text{ cm}"),
        ("5 cm", "5 centimeters"),
        ("30", r"30^\circ"),
        ("5", "x = 5"),
        (r"\frac{1}{2}", "0.5"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2+1", "1 + x^2"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("x>5", "5<x"),
        ("B", "(B)"),
        ("triangle", r"\text{Triangle}"),
    ],
)
def test_equal_answers_are_correct(gold, answer):
    assert score(respond(answer), gold).outcome == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "15"),
        ("15", "5"),
        ("15", "1 5"),
        ("5", "1,2,3,4,5"),
        ("5", "1,2,3..."),
        ("5", r"1, 2, \dots"),
        ("5", "5 or 6"),
        ("5", r"\pm 5"),
        ("5", "4 = 5"),
        ("25", "2x = 5"),
        ("5", r"5\text{ million}"),
        ("5 cm", "5 m"),
        ("50%", "50"),
        ("5", "5!"),
        ("A", "A, B"),
        ("A", "ABCD"),
        ("yes", "yes no"),
        ("(1,2)", "(2,1)"),
        ("x>5", r"x \geq 5"),
        ("0.00000001", r"2\times 10^{-8}"),
        ("0", "10^{-9}"),
        ("5", r"\frac{5}"),
        ("5", ""),
    ],
)
def test_nothing_but_an_equal_answer_is_correct(gold, answer):
    assert score(respond(answer), gold).outcome == "wrong"


def test_a_response_without_a_box_is_wrong():
    verdict = score("<think>a</think><answer>5</answer>", "5")
    assert (verdict.outcome, verdict.reason) == ("wrong", "no boxed answer")


@pytest.mark.parametrize("gold", ["", r"\frac{1}{", "x^{2", r"\foo{bar"])
@pytest.mark.parametrize("answer", ["7", "1, 2", "some words"])
def test_a_broken_gold_cannot_be_judged(gold, answer):
    assert score(respond(answer), gold).outcome == "could_not_judge"


def test_reward_is_the_weighted_sum_and_nan_where_nothing_could_be_judged():
    config = RewardConfig(format_weight=0.5, accuracy_weight=2.0)
    with VerifierPool(config) as pool:
        pool.submit(
            make_group("5", [respond("5"), respond("6"), r"<answer>\boxed{5}</answer>", ""])
        )
        pool.submit(make_group("", [respond("5")]))
        judged, unjudged = pool.results()
    assert [s.reward for s in judged.scores] == [2.5, 0.5, 2.0, 0.0]
    assert math.isnan(unjudged.scores[0].reward)
    assert pool._pool is None  # none of these needed a worker


@pytest.fixture(scope="module")
def warm_pool():
    with VerifierPool(RewardConfig(deadline_s=1.0)) as pool:
        pool.submit(make_group("2x", [respond("x+x")]))
        assert [s.verdict.outcome for s in next(pool.results()).scores] == ["correct"]
        yield pool


def test_a_hung_answer_costs_the_deadline_and_the_pool_goes_on(warm_pool):
    start = time.monotonic()
    warm_pool.submit(make_group("5", [respond("9^{9^{9}}"), respond(r"\log_2 32")], "hung"))
    warm_pool.submit(make_group("7", [respond("7"), respond(r"\log_2 8")], "next"))
    hung, following = warm_pool.results()
    assert time.monotonic() - start < 12  # 1 s, a new worker's imports, and room for a busy machine
    assert (hung.group.prompt.prompt_id, following.group.prompt.prompt_id) == ("hung", "next")
    assert hung.scores[0].verdict.outcome == "could_not_judge"
    assert hung.scores[0].verdict.reason == "deadline of 1 s passed"
    assert math.isnan(hung.scores[0].reward)
    assert hung.scores[1].verdict.outcome == "correct"
    assert [s.verdict.outcome for s in following.scores] == ["correct", "wrong"]


def test_the_pool_goes_on_after_its_idle_worker_is_killed(warm_pool):
    for pid in list(warm_pool._pool._pool_manager.worker_manager.workers):
        os.kill(pid, signal.SIGKILL)
    warm_pool.submit(make_group("2x", [respond("x+x"), respond("2x")]))
    (scored,) = warm_pool.results()
    assert [s.verdict.outcome for s in scored.scores] == ["correct", "correct"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see processes")
def test_hostile_answers_among_ordinary_ones_cost_a_deadline_each_and_leave_nothing_behind():
    hostile = ["9^{9^{9}}", "8^{9^{9}}", "7^{9^{9}}", "6^{9^{9}}"]
    here = psutil.Process()
    before = {child.pid for child in here.children(recursive=True)}
    with VerifierPool(RewardConfig(deadline_s=2.0, num_workers=2)) as pool:
        pool.submit(make_group("2x", [respond("x+x")]))
        list(pool.results())  # workers have started
        start = time.monotonic()
        for number, answer in enumerate(hostile):
            ordinary = [respond(r"\log_2 32"), respond("5"), respond(r"\log_2 16")]
            pool.submit(make_group("5", [respond(answer), *ordinary], str(number)))
        groups = list(pool.results())
        assert time.monotonic() - start < 2.0 * len(hostile) + 15  # on a busy machine
    for group in groups:
        outcomes = [score.verdict.outcome for score in group.scores]
        assert outcomes[0] != "correct" and outcomes[1:] == ["correct", "correct", "wrong"]
    assert sum(g.scores[0].verdict.outcome == "could_not_judge" for g in groups) >= 3
    left = {child.pid for child in here.children(recursive=True)}
    with VerifierPool(RewardConfig(deadline_s=1.0, num_workers=2)) as pool:
        pool.submit(make_group("5", [respond("9^{9^{9}}"), respond(r"\log_2 32")]))
        list(pool.results())
    # The fork server and Python's resource tracker stay: the same ones.
    assert {child.pid for child in here.children(recursive=True)} <= left
    assert len(left - before) <= 2


def test_one_answer_of_a_group_is_judged_once():
    with VerifierPool(RewardConfig()) as pool:
        texts = [respond("6"), "no tags " + respond("6"), respond("5")]
        pool.submit(make_group("5", texts))
        (_, judgements) = pool._submitted[0]
        (group,) = pool.results()
    assert judgements[0] is judgements[1] and len({id(j) for j in judgements}) == 2
    assert [s.reward for s in group.scores] == [1.0, 0.0, 2.0]


def test_verdicts_are_counted_by_outcome_and_by_why_none_was_possible():
    nan, reasons = (
        math.nan,
        [
            *("empty gold", "gold is not mathematics", "deadline of 1 s passed"),
            *("verifier worker died", "judge: time-out", "verifier failed: TypeError"),
        ],
    )
    scores = [ScoredRollout(Verdict("could_not_judge", reason), True, nan) for reason in reasons]
    scores += [ScoredRollout(Verdict("correct", "equal"), True, 2.0)] * 2
    scores += [ScoredRollout(Verdict("wrong", "different numbers"), True, 1.0)]
    group = ScoredGroup(make_group("5", [""] * len(scores)), tuple(scores))
    metrics = group_metrics(group_sums([group]), 1.0)
    verdicts = {key[9:]: value for key, value in metrics.items() if key.startswith("verdicts/")}
    assert verdicts == {
        **{"correct": 2, "wrong": 1, "could_not_judge": 6, "unjudged_gold": 2},
        **{"unjudged_deadline": 1, "unjudged_judge": 1, "unjudged_verifier": 2},
    }
    assert set(group_sums([])) == set(group_sums([group]))  # sums add over ranks


MAIN = """
print("main imported", flush=True)
from pathlib import Path
from types import SimpleNamespace as Fake  # a real group would import torch here: slow
from megatron_mmr1.config.schema import RewardConfig
from megatron_mmr1.rewards.pool import VerifierPool

if __name__ == "__main__":
    response = Fake(text=r"<answer>\\boxed{x+x}</answer>")
    with VerifierPool(RewardConfig()) as pool:
        pool.submit(Fake(prompt=Fake(answer="2x"), rollouts=[response]))
        print(pool._submitted[0][1][0].future.result()[0])
        (pid,) = pool._pool._pool_manager.worker_manager.workers
        print("libtorch" in Path(f"/proc/{pid}/maps").read_text())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to look at a worker")
def test_a_worker_loads_neither_torch_nor_the_main_module(tmp_path):
    (tmp_path / "main_of_test.py").write_text(MAIN)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "main_of_test"]  # as the trainer is started
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["main imported", "correct", "False"]
