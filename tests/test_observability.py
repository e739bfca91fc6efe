"""A run's records survive a round trip, a cut on resume, and being shown to a person."""

import json
import math
import re
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from rich.console import Console

from megatron_mmr1.observability.calibration import (
    read_calibration,
    reliability_plot,
    write_calibration,
)
from megatron_mmr1.observability.metrics import MetricsWriter, read_metrics, truncate_after
from megatron_mmr1.observability.progress import Progress
from megatron_mmr1.observability.prompt_stats import append_prompt_stats, read_prompt_stats
from megatron_mmr1.observability.report import write_report
from megatron_mmr1.observability.report_curves import time_cards
from megatron_mmr1.observability.rollouts import read_rollouts, rollout_steps, write_rollouts
from megatron_mmr1.observability.run_records import RunRecords
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.observability.vps_plots import transition_counts
from megatron_mmr1.types import (
    Prompt,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    ScoredRollout,
    Verdict,
)

LEVELS = ["level 1", "level 2", "level 3", "level 4"]
CONFIG = """experiment: digits
seed: 3
num_steps: {num_steps}
prompts_per_step: 16
model: {{path: models/digits-tiny}}
sampler: {{preset: posterior, mixture_ratio: 0.5, score: mixed, prior: record}}
rollout: {{group_size: 8, temperature: 1.0}}
algorithm: {{clip_low: 0.2, clip_high: 0.2, optimizer_steps_per_batch: {optimizer_steps}}}
"""


def png(pixels_HW: np.ndarray) -> bytes:
    """An 8-bit grey PNG."""
    height, width = pixels_HW.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels_HW.astype(np.uint8))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def scored_group(prompt_id: str, texts: list[str], answer: str = "7", image: bytes = b"x"):
    nothing = torch.zeros(0, dtype=torch.int64)
    question = "What is the sum of the two digits in the picture?"
    prompt = Prompt(
        prompt_id, nothing, nothing, None, None, answer, "level 2", question, images=(image,)
    )
    rollouts, scores = [], []
    for i, text in enumerate(texts):
        tokens = tuple(range(len(text.split()) + 4))
        logprobs = tuple(-math.log(2 + i + t) / 3 for t in tokens)
        rollouts.append(Rollout(i, tokens, logprobs, "stop", text))
        if f"boxed{{{answer}}}" in text:
            scores.append(ScoredRollout(Verdict("correct", "equal"), True, 2.0))
        elif "boxed" in text:
            scores.append(ScoredRollout(Verdict("wrong", "not equal"), True, 1.0))
        else:
            verdict = Verdict("could_not_judge", "deadline of 10 s passed")
            scores.append(ScoredRollout(verdict, False, math.nan))
    return ScoredGroup(RolloutGroup(prompt, tuple(rollouts), 5), tuple(scores))


def write_synthetic_run(run_dir, num_steps: int = 40, optimizer_steps: int = 1, seed: int = 0):
    """A run that learns: numbers made up, in the form that the trainer writes them."""
    rng = np.random.default_rng(seed)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = CONFIG.format(num_steps=num_steps, optimizer_steps=optimizer_steps)
    (run_dir / "config.yaml").write_text(config)
    difficulty = rng.uniform(-3, 3, 300)
    ids = [f"train-{i}" for i in range(len(difficulty))]
    visited = np.zeros(len(ids), dtype=bool)

    def evaluation(skill: float) -> dict[str, float]:
        rates = {name: 1 / (1 + math.exp(i * 1.3 - skill)) for i, name in enumerate(LEVELS)}
        found = {"time/evaluation_s": rng.uniform(3, 4)}
        for mode, bonus in (("sampled", 0.0), ("greedy", 0.03)):
            found[f"eval/accuracy_{mode}"] = float(np.mean(list(rates.values()))) + bonus
            for name, rate in rates.items():
                noisy = float(np.clip(rate + bonus + rng.normal(0, 0.02), 0, 1))
                found[f"eval/accuracy_{mode}/{name}"] = noisy
        return found

    with MetricsWriter(run_dir) as writer:
        writer.write(0, evaluation(-0.8))
        for step in range(1, num_steps + 1):
            skill = -0.8 + 4.2 * (1 - math.exp(-2.2 * step / num_steps))
            p = 1 / (1 + np.exp(difficulty - skill))
            mixed = float(np.mean(1 - p**8 - (1 - p) ** 8)) + rng.normal(0, 0.05)
            right = float(np.mean(p**8))
            metrics = {
                "reward/mean": float(p.mean()) + 0.9 + rng.normal(0, 0.06),
                "reward/format_rate": min(1.0, 0.9 + 0.1 * step / num_steps),
                "groups/pass_rate": float(p.mean()) + rng.normal(0, 0.04),
                "groups/mixed_rate": mixed,
                "groups/all_correct_rate": min(right, 1 - mixed),
                "groups/all_wrong_rate": max(1 - mixed - right, 0.0),
                "loss": rng.normal(0, 0.01),
                "grad_norm": float(rng.lognormal(-0.6, 0.35)),
                "lr": 1e-4,
                "clip_fraction": 0.01,
                "entropy/mean": 1.1 * math.exp(-1.4 * step / num_steps) + rng.normal(0, 0.03),
                "logprob_diff/mean": float(rng.lognormal(-12, 0.2)),
                "logprob_diff/max": float(rng.lognormal(-9, 0.4)),
                "rollout/truncated_rate": float(rng.uniform(0, 0.03)),
                "rollout/response_tokens_mean": 24 + 6 * step / num_steps + rng.normal(0, 1),
                "rollout/tokens_per_s": rng.normal(1150, 60),
                "verdicts/could_not_judge": float(step == 5),
                "sampler/visited_rate": min(1.0, step / num_steps * 1.4),
                "sampler/vps_mean": 0.16 + 0.04 * math.sin(step / 9),
                "time/rollout_s": rng.uniform(2.5, 3.2),
                "time/reward_s": rng.uniform(0.05, 0.1),
                "time/train_s": rng.uniform(1.8, 2.1),
                "time/forward_s": 0.5,
                "time/backward_s": 1.0,
                "time/weight_sync_s": rng.uniform(0.1, 0.15),
                "time/sampler_s": rng.uniform(0.02, 0.04),
                "time/step_s": rng.uniform(5.2, 5.8),
            }
            if step % 10 == 0 or step == num_steps:
                metrics |= evaluation(skill)
            writer.write(step, metrics)
            if step % 4 == 0:
                visited |= rng.uniform(size=len(ids)) < 0.35
                rate = np.where(visited, rng.binomial(8, p) / 8, np.nan)
                ovs = np.where(visited, rate * (1 - rate), 0.125)
                tds = rng.uniform(0.3, 0.7, len(ids))
                rows = {
                    "step": [step] * len(ids),
                    "prompt_id": ids,
                    "category": [LEVELS[i % 4] for i in range(len(ids))],
                    "pass_rate": rate,
                    "ovs": ovs,
                    "tds": tds,
                    "posterior_a": 1 + 8 * np.nan_to_num(rate),
                    "posterior_b": 9 - 8 * np.nan_to_num(rate),
                    "weight": ovs,
                    "vps": 0.8 * ovs + 0.2 * np.where(visited, tds, 0.5),
                    "draws": rng.integers(0, 9, len(ids)),
                    "age": rng.integers(0, 30, len(ids)),
                }
                append_prompt_stats(run_dir, rows)
            if step in (1, num_steps):
                groups = [
                    scored_group(
                        f"train-{i}",
                        [
                            f"<think> I see {a} and {7 - a}. {a} + {7 - a} = {s} </think>"
                            f"<answer> \\boxed{{{s}}} </answer>"
                            for a, s in ((3, 7), (2, 7), (4, 8 - (step > 1)), (5, 6))
                        ]
                        + ["I am <b>not</b> sure & stop", "\\boxed{7}"],
                        image=png(rng.integers(0, 60, (28, 56)) + _strokes()),
                    )
                    for i in range(4)
                ]
                write_rollouts(run_dir, step, groups)


def _strokes() -> np.ndarray:
    image = np.zeros((28, 56))
    image[5:8, 6:20] = image[8:23, 16:19] = image[5:23, 34:37] = image[20:23, 34:48] = 190
    return image


def test_metrics_round_trip_and_store_what_is_not_finite_as_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"eval/accuracy_sampled": 0.25})
        writer.write(1, {"loss": 0.1 + 0.2, "kl/mean": math.nan, "grad_norm": math.inf})
    assert read_metrics(tmp_path) == [
        {"step": 0, "eval/accuracy_sampled": 0.25},
        {"step": 1, "loss": 0.1 + 0.2, "kl/mean": None, "grad_norm": None},
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_half_written_last_line_is_ignored_and_a_broken_earlier_one_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(tmp_path)


def test_truncation_forgets_every_record_after_the_step(tmp_path):
    write_synthetic_run(tmp_path, num_steps=12)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": 0.')
    truncate_after(tmp_path, 8)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(9))
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    assert rollout_steps(tmp_path) == [1]
    assert set(read_prompt_stats(tmp_path)["step"]) == {4, 8}
    with MetricsWriter(tmp_path) as writer:
        writer.write(9, {"loss": 1.0})
    assert read_metrics(tmp_path)[-1] == {"step": 9, "loss": 1.0}


def test_truncating_an_empty_folder_does_nothing(tmp_path):
    truncate_after(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_prompt_stats_append_and_keep_nan(tmp_path):
    assert len(read_prompt_stats(tmp_path)["step"]) == 0
    rows = {
        "step": [4, 4],
        "prompt_id": ["a", "b\u2028"],
        "category": ["", "level 1"],
        "pass_rate": np.array([0.5, np.nan]),
        "posterior_a": [2.0, 1.0],
        "posterior_b": [2.0, 1.0],
        "weight": [0.2, 0.1],
        "ovs": [0.25, 0.1],
        "tds": [0.3, 0.4],
        "vps": [0.26, 0.2],
        "draws": [1, 0],
        "age": np.array([0, 4], dtype=np.int32),
    }
    append_prompt_stats(tmp_path, rows)
    append_prompt_stats(tmp_path, rows | {"step": [8, 8]})
    stats = read_prompt_stats(tmp_path)
    assert stats["step"].tolist() == [4, 4, 8, 8]
    assert stats["prompt_id"].tolist() == ["a", "b\u2028"] * 2
    np.testing.assert_array_equal(stats["pass_rate"], [0.5, np.nan] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt_stats.parquet"]


def test_rollouts_round_trip_exactly_with_any_text(tmp_path):
    texts = [
        "line\u2028separator \\boxed{7}",
        "next\x85line\r\n é 数 \ud800 \\boxed{1}",
        "no answer",
    ]
    group = scored_group("p", texts)
    write_rollouts(tmp_path, 3, [group, group])
    first, second = read_rollouts(tmp_path, 3)
    assert first == second and first["step"] == 3 and first["weight_version"] == 5
    assert [rollout["text"] for rollout in first["rollouts"]] == texts
    assert [rollout["reward"] for rollout in first["rollouts"]] == [2.0, 1.0, None]
    for read, written in zip(first["rollouts"], group.group.rollouts, strict=True):
        assert tuple(read["rollout_logprobs"]) == written.rollout_logprobs  # exact, not approximate
        assert tuple(read["token_ids"]) == written.token_ids


def test_phases_add_up_and_start_over():
    timers = PhaseTimers()
    for _ in range(2):
        with timers.phase("rollout"):
            time.sleep(0.01)
    seconds = timers.pop()
    assert list(seconds) == ["time/rollout_s"] and seconds["time/rollout_s"] >= 0.02
    assert timers.pop() == {}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_shows_the_step_and_keeps_the_last_evaluation(tmp_path, is_terminal):
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, force_terminal=is_terminal, width=120)
        with Progress(20, initial=10, title="digits", console=console) as progress:
            progress.update(11, {"reward/mean": 1.5, "eval/accuracy_sampled": 0.25, "lr": 1.0})
            progress.update(12, {"reward/mean": math.nan})
    shown = (tmp_path / "out").read_text()
    assert "held-out 25.0%" in shown.rsplit("reward -", 1)[1] and "12/20" in shown
    assert "lr" not in shown


def test_transitions_count_only_prompts_that_both_updates_scored():
    edges = np.linspace(0, 1, 11)
    counts = transition_counts({"a": 0.05, "b": 1.0, "c": 0.5}, {"a": 0.95, "b": 1.0}, edges)
    assert counts[0, 9] == 1 and counts[9, 9] == 1 and counts.sum() == 2


def test_report_is_self_contained_and_escapes_what_it_shows(tmp_path):
    write_synthetic_run(tmp_path)
    html = write_report(tmp_path).read_text()
    assert "I am &lt;b&gt;not&lt;/b&gt; sure &amp; stop" in html and "<b>not</b>" not in html
    assert "<script" not in html and "http" not in html and "data:image/png;base64," in html
    assert "Clip fraction" not in html and "level 4" in html and "within one bin" in html
    write_synthetic_run(tmp_path / "many", num_steps=2, optimizer_steps=4)
    assert "Clip fraction" in write_report(tmp_path / "many").read_text()


def test_report_says_in_words_what_a_run_has_not_recorded(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    html = write_report(tmp_path).read_text()
    assert "No training step was recorded" in html and "No held-out evaluation" in html
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward/mean": 1.0, "grad_norm": math.nan, "time/step_s": 2.0})
    html = write_report(tmp_path).read_text()
    assert "No prompt statistics" in html and "No rollouts were kept" in html


def test_report_of_a_cold_start_shows_its_loss(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1 / step, "grad_norm": 1.0, "tokens_per_s": 900.0})
    assert "<h3>Loss</h3>" in write_report(tmp_path).read_text()


def test_the_entry_point_is_light_and_names_a_folder_that_is_no_run(tmp_path):
    write_synthetic_run(tmp_path / "run", num_steps=2)
    command = [sys.executable, "-m", "megatron_mmr1.report"]
    done = subprocess.run([*command, tmp_path / "run"], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "run" / "report.html"), done.stderr
    for folder in (tmp_path, tmp_path / "absent"):
        done = subprocess.run([*command, folder], capture_output=True, text=True)
        assert done.returncode == 2 and str(folder) in done.stderr
        assert len(done.stderr.splitlines()) == 1
    code = (
        "import sys, megatron_mmr1.report, json;"
        "print(json.dumps([m for m in ('torch', 'megatron', 'vllm') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(done.stdout) == []


def test_calibration_round_trips_and_is_drawn(tmp_path):
    assert read_calibration(tmp_path) is None
    sums_3B = np.zeros((3, 10))
    sums_3B[:, 4] = 20.0, 9.0, 12.0
    write_calibration(tmp_path, sums_3B)
    found = read_calibration(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found, sums_3B)
    plot = reliability_plot(found)
    assert "20 groups: predicted 45%, seen 60%" in plot
    assert plot.count("<circle") == 1  # bins without groups have no point
    write_synthetic_run(tmp_path, num_steps=8)
    assert "Is the sampler calibrated?" in write_report(tmp_path).read_text()


def test_phases_of_steps_that_have_other_parts_are_shown(tmp_path):
    """As after a resume at another layout, where rank 0 has another pipeline stage's parts."""
    rows = [
        {"step": 1, "time/train_s": 2.0, "time/forward_s": 0.5, "time/head_s": 0.5},
        {"step": 2, "time/train_s": 3.0, "time/forward_s": 1.0},
        {"step": 3, "time/rollout_s": 4.0},
    ]
    page = time_cards(RunRecords(tmp_path, rows, {}, None, "", {}))
    rest = re.findall(r"train \(rest\).*?</tr>", page, re.DOTALL)[-1]
    assert ">3.0<" in rest and ">2<" in rest  # in all, and how often
