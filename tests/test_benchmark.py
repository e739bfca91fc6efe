"""The GPU benchmark where there is no GPU: it says so, and its routine runs at tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAYS = {
    "copy": [""],
    "log-probs": ["ours", "torch", "torch.compile"],
    "gradient": ["ours", "ours, log-probs' given", "torch", "torch.compile"],
    "sequence loss": ["ours", "torch", "torch.compile"],
    "head": ["ours", "torch", "torch.compile"],
}


def _run(script: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / script), *args],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment,
    )


def test_without_a_gpu_it_says_so_in_one_line_and_exits_with_2(tmp_path: Path):
    done = _run("tools/benchmark_kernels.py", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 2 and not (tmp_path / "out.json").exists()
    assert done.stderr == "benchmark_kernels needs a CUDA GPU, and torch sees none.\n"


def test_the_whole_routine_runs_at_tiny_sizes_in_the_interpreter(tmp_path: Path):
    """Every way computes the right thing, and a wrong result would end it (benchmark_cases.py)."""
    done = _run("tests/benchmark_cases.py", str(tmp_path / "out.json"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["device"] == "cpu" and result["versions"]["torch"]
    found = {(row["tp_size"], row["task"], row["way"]): row for row in result["rows"]}
    for tp_size in (1, 2):
        for task, ways in WAYS.items():
            for way in ways:
                assert f"| {tp_size} | {task} | {way} | 1.0000 |" in done.stdout
                assert found[tp_size, task, way]["ms"] == 1.0
        # At equal times the shares of a copy (4 bytes a logit) are those of the bytes.
        assert found[tp_size, "gradient", "ours"]["of_copy"] == 1.5
        assert found[tp_size, "log-probs", "ours"]["of_copy"] == 0.5
        assert found[tp_size, "head", "ours"]["tflop_per_s"] == 6 * 32 * 96 / tp_size * 16 / 1e9
        assert f"TP {tp_size}: 150% of copy at 6 bytes a logit; target 90% reached" in done.stdout
