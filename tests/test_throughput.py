"""The throughput benchmark: its clocks, its arithmetic on numbers made up here, its lengths, its
page; and the tool itself, on two processes, with a layout that is refused.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from processes import Process

from megatron_mmr1.backend.clock import StepClock
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.observability.timers import PhaseTimers
from megatron_mmr1.throughput import hardware, page, summary, tables
from megatron_mmr1.throughput.launch import points_of, reason
from megatron_mmr1.throughput.lengths import write_prompts
from megatron_mmr1.throughput.memory import StepMemory
from megatron_mmr1.throughput.trl import compare

# Clocks


def test_every_moment_belongs_to_the_innermost_part_of_a_step():
    clock, start = StepClock(), time.perf_counter()
    with clock.part("pipeline"):
        with clock.part("forward"):
            time.sleep(0.02)
            with clock.part("head"):
                time.sleep(0.03)
        with clock.part("logprobs", is_whole=True):
            timer = clock.of_schedule("forward-compute", log_level=2)
            timer.start(barrier=True)
            time.sleep(0.01)
            timer.stop()
    elapsed = time.perf_counter() - start
    time.sleep(0.02)  # nobody's
    assert clock.pop() == {}, "marks are read when the step is over"
    clock.settle()
    found = clock.pop()
    assert set(found) == {f"time/{n}_s" for n in ("pipeline", "forward", "head", "logprobs")}
    assert found["time/head_s"] >= 0.03 and found["time/logprobs_s"] >= 0.01
    assert found["time/forward_s"] >= 0.02
    assert sum(found.values()) <= elapsed, "nothing is counted twice"


def test_an_error_inside_a_part_leaves_none_open():
    clock = StepClock()
    with pytest.raises(ZeroDivisionError), clock.part("forward"):
        clock.begin("head")
        raise ZeroDivisionError
    with clock.part("optimizer"):
        pass
    clock.settle()
    assert set(clock.pop()) == {"time/forward_s", "time/head_s", "time/optimizer_s"}


def test_a_benchmark_waits_for_the_device_before_every_reading_and_training_does_not():
    timers, waited = PhaseTimers(), []
    timers.waits = lambda: waited.append(len(waited))
    with timers.phase("train"):
        assert waited == [0]
    assert waited == [0, 1]


def test_memory_on_a_gpu_is_what_is_taken_at_a_phases_ends(monkeypatch: pytest.MonkeyPatch):
    """The most of a step, then forgotten; an engine that sleeps gives its share back."""
    free = iter([70, 20, 50, 60])
    for name, report in (
        ("is_available", lambda: True),
        ("synchronize", lambda: None),
        ("mem_get_info", lambda: (next(free), 80)),
    ):
        monkeypatch.setattr(torch.cuda, name, report)
    memory, timers = StepMemory(), PhaseTimers()
    timers.waits = memory.read_gpu
    with timers.phase("rollout"):
        pass
    assert memory.pop() == 60
    with timers.phase("train"):
        pass
    assert memory.pop() == 30
    monkeypatch.undo()
    assert torch.cuda.is_available() or memory.pop() > 1 << 20, "resident, on a CPU"


# Arithmetic


def entry(kind: str, processes: int, step_s: float, **more: Any) -> dict[str, Any]:
    """A measured launch of two steps; the second takes half as long again."""
    seconds = {
        "sampler": 0.1, "rollout": 4.0, "turns": 0.5,
        "forward": 1.0, "backward": 2.0, "train": 4.0,
    }  # fmt: skip
    steps = [
        {
            "seconds": seconds | {"step": step_s * factor},
            "tokens": 12_000,
            "generated_tokens": 8_000,
            "flops": {"train": {"language": 3e9, "vision": 1e9}, "logprobs": {"language": 0.0}},
            "memory_bytes": [2 << 30, 3 << 30],
        }
        for factor in (1.0, 1.5)
    ]
    return {
        "kind": kind,
        "label": f"{kind} {processes}",
        "processes": processes,
        "peak": {"flops": 1e9, "source": "made up"},
        "formula": "6 N L & more",
        "steps": steps,
    } | more


def test_figures_are_those_worked_out_by_hand():
    found = entry("layout", 2, 10.0)
    tokens = summary.tokens_per_s_per_gpu(found)
    assert (tokens.low, tokens.median, tokens.high) == (400.0, 500.0, 600.0)
    assert summary.generated_per_s_per_gpu(found).median == 1000.0
    # 4 GFLOPs in 4 s on two processes of 1 GFLOP/s; of the whole step, 10 and 15 s.
    assert summary.train_mfu(found).median == pytest.approx(0.5)
    assert summary.step_mfu(found).high == pytest.approx(0.2)
    assert summary.memory_bytes(found) == 3 << 30
    phases = summary.phase_seconds(found)
    assert phases["train_rest"].median == pytest.approx(1.0)
    assert phases["turns"].median == 0.5
    assert phases["step_rest"].low == pytest.approx(10 - 4 - 4.6)
    assert sum(spread.low for spread in phases.values()) == pytest.approx(10.0)


def test_scaling_is_measured_against_the_smallest_number_of_processes():
    points = points_of(["a=1 b=2", ""], 4, [2, 4], [1, 2], prompts_per_step=16)
    assert [(p.kind, p.processes) for p in points] == [
        ("layout", 4), ("layout", 4), ("weak", 2), ("weak", 4), ("strong", 1), ("strong", 2),
    ]  # fmt: skip
    assert points[0].overrides == ("a=1", "b=2") and points[1].overrides == ()
    assert [p.overrides for p in points[2:4]] == [
        ("prompts_per_step=16",), ("prompts_per_step=32",),
    ]  # fmt: skip
    rows = tables.scaling_rows([entry("strong", 2, 8.0), entry("strong", 1, 10.0)])
    assert [row[:2] for row in rows] == [("strong", "1"), ("strong", "2")]
    assert [row[3] for row in rows] == ["100%", "62%"]


def test_a_launch_that_came_to_nothing_says_why():
    log = "loading\nerror: parallel.tp_size=3 does not divide; use 1\ntorchrun: ChildFailedError\n"
    assert reason(log, 1) == "parallel.tp_size=3 does not divide; use 1"
    assert reason("Traceback\nRuntimeError: out of memory\nbye", 3) == (
        "RuntimeError: out of memory (exit status 3)"
    )
    assert reason("", -9) == "it said nothing (exit status -9)"


def test_the_page_shows_every_launch_and_is_one_file_without_scripts():
    record = {
        "experiment": "digits",
        "settings": ["a=<b>"],
        "options": {"steps": 2, "warmup": 1, "fixed": None, "image": None},
        "machine": {"device": "CPU", "cpus": 2, "load_average": [1.5, 1, 1], "commit": "abc"},
        "points": [
            entry("layout", 1, 10.0),
            entry("weak", 1, 10.0),
            entry("weak", 2, 11.0),
            {"kind": "layout", "label": "bad", "processes": 2, "error": "x < 1 is refused"},
        ],
    }
    html = page.html(record)
    assert "layout 1" in html and "weak 2" in html and "x &lt; 1 is refused" in html
    assert "6 N L &amp; more" in html and "Weak scaling" in html and "a=&lt;b&gt;" in html
    assert "<script" not in html and "http" not in html
    assert "| bad | 2 | x < 1 is refused |" in tables.markdown(record)


@pytest.mark.parametrize(
    ("name", "number_format", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp8", None),
        ("Some Other GPU", "bfloat16", None),
    ],
)
def test_a_gpus_peak_is_its_data_sheets(name: str, number_format: str, teraflops: float | None):
    found = hardware.peak_of(name, number_format)
    assert (found.flops / 1e12 if found else None) == teraflops


def test_without_a_gpu_the_peak_is_measured_and_says_so():
    found = hardware.peak("float32", "off")
    assert found.flops > 1e8 and found.source.startswith("measured")


# Equal lengths


@pytest.mark.parametrize("image_size", [None, (56, 84)])
def test_prompts_have_exactly_the_length_that_was_asked_for_and_differ(
    tmp_path: Path, tiny_processor: PromptProcessor, image_size: tuple[int, int] | None
):
    path = tmp_path / "fixed.parquet"
    write_prompts(path, tiny_processor, 4, 50, image_size)
    rows = pq.read_table(path).to_pylist()
    prompts = [
        tiny_processor.prompt(str(n), row["problem"], [image["bytes"] for image in row["images"]])
        for n, row in enumerate(rows)
    ]
    assert {len(prompt.token_ids) for prompt in prompts} == {50}
    assert len({row["problem"] for row in rows}) == 4
    assert all((prompt.pixel_values is not None) == bool(image_size) for prompt in prompts)


def test_a_length_that_no_prompt_has_is_refused(tmp_path: Path, tiny_processor: PromptProcessor):
    with pytest.raises(ValueError, match=r"--fixed: no prompt of 3 tokens was found"):
        write_prompts(tmp_path / "fixed.parquet", tiny_processor, 1, 3)


# Beside TRL


def test_a_ratio_is_of_tokens_a_second_turn_by_turn():
    ours = [{"tokens": 100.0, "train_s": 1.0, "train_cpu_s": 1.0} for _ in range(2)]
    theirs = [{"tokens": 200.0, "train_s": seconds, "train_cpu_s": 4.0} for seconds in (4.0, 8.0)]
    found = compare.ratios(ours, theirs, "train")
    assert found["wall"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    assert found["cpu"]["median"] == 2.0


def test_sides_that_compute_something_else_are_noticed():
    first = {
        "ours": {"loss": -0.00644, "grad_norm": 0.665},
        "TRL": {"loss": -0.00645, "grad_norm": 0.6651},
    }
    assert compare.disagreement(first) == ""
    first["TRL"]["grad_norm"] = 0.67
    assert compare.disagreement(first) == "grad_norm: 0.665 ours, 0.67 TRL"


# The tools


@pytest.mark.vllm
@pytest.mark.distributed
def test_two_processes_are_measured_and_a_refused_layout_is_passed_over(
    tmp_path: Path, tiny_model_dir: Path, digits_dir: Path
):
    out = tmp_path / "out"
    done = Process(
        tmp_path / "benchmark",
        *("tools/benchmark_throughput.py", "--steps", "2", "--warmup", "1", "--processes", "2"),
        *("--layout", "", "--layout", "parallel.pp_size=3", "--fixed", "40", "8"),
        *("--image", "56", "56", "--out", str(out)),
        *("experiment=digits", f"model.path={tiny_model_dir}", "prompts_per_step=4"),
        *(f"data.train={digits_dir / 'train.parquet'}", "rollout.group_size=4"),
        PYTHONPATH=os.environ.get("PYTHONPATH", str(Path(__file__).parents[1])),
    ).wait()
    done.succeeded()
    assert "step 2/2:" in done.stdout and "warm-up 1/1:" in done.stdout
    record = json.loads((out / "throughput.json").read_text())
    measured, refused = record["points"]
    assert refused["error"].startswith("parallel.pp_size=3") and "steps" not in refused
    assert measured["processes"] == 2 and len(measured["steps"]) == 2
    for step in measured["steps"]:
        assert step["tokens"] == 4 * 4 * (40 + 8) and step["generated_tokens"] == 4 * 4 * 8
        assert step["longest_sequence"] == 48 and step["sequences"] == 16
        assert len(step["memory_bytes"]) == len(step["seconds_of_ranks"]) == 2
        phases = summary.phase_seconds(measured)
        assert {"rollout", "reward", "logprobs", "forward", "backward", "optimizer"} < set(phases)
        assert {"weight_sync", "sampler", "vision", "head", "turns"} < set(phases)
    assert all(spread.low >= 0 for spread in phases.values())
    assert record["machine"]["versions"]["torch"] and measured["config"]["prompts_per_step"] == 4
    assert "parallel.pp_size=3" in (out / "index.html").read_text()


@pytest.mark.slow
def test_a_training_step_computes_what_trls_does(tmp_path: Path):
    """Loss and gradient norm within `TOLERANCE`; how fast either is, this machine may not say."""
    done = Process(
        tmp_path / "compare",
        *("tools/compare_trl.py", "--only", "digits", "--repeats", "1"),
        *("--json", str(tmp_path / "trl.json")),
        PYTHONPATH=os.environ.get("PYTHONPATH", str(Path(__file__).parents[1])),
    ).wait()
    done.succeeded()
    result = json.loads((tmp_path / "trl.json").read_text())["results"]["digits"]
    assert result["disagreement"] == "" and len(result["turns"]) == 3
    assert all(turns[0]["tokens"] == result["turns"]["ours"][0]["tokens"]
               for turns in result["turns"].values())  # fmt: skip
