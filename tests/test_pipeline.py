"""MMR1's whole pipeline from files of its own forms, by the example's script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import REPOSITORY

from megatron_mmr1.observability.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_cold_start_rl_and_benchmarks_from_files(tmp_path: Path):
    sizes = {"SFT_STEPS": "60", "RL_STEPS": "2", "DEMONSTRATIONS": "400", "PROMPTS": "80"}
    environment = os.environ | sizes | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    command = ["sh", "examples/pipeline/run.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "inspection" / "index.html").exists()
    losses = [row["loss"] for row in read_metrics(tmp_path / "digits_sft" / "sft")]
    assert len(losses) == 60 and losses[-1] < losses[0] / 2
    rows = read_metrics(tmp_path / "digits" / "rl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["logprob_diff/max"] < 1e-3 for row in rows[1:])
    for benchmark in ("mathvista", "chartqa"):
        for model in ("sft", "rl"):
            folder = tmp_path / "evaluation" / benchmark / model
            summary = json.loads((folder / "summary.json").read_text())
            assert summary["num_questions"] == 80 and summary["num_bad_rows"] == 0
            assert len((folder / "samples.jsonl").read_text().splitlines()) == 80
            assert (folder / "report.html").exists() and (folder / "predictions.tsv").exists()
    assert (tmp_path / "evaluation" / "comparison" / "comparison.html").exists()
