"""GRPO teaches: the demo's own commands, whole. Minutes long; `make learning` has more seeds."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mmr1.data.digits import build_digits
from megatron_mmr1.observability.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.vllm
def test_held_out_accuracy_rises_by_several_points(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Several runs gained 10 to 14 points; 5 leaves room for another machine's rounding."""
    digits_dir = tmp_path / "digits_data"
    build_digits(digits_dir)
    for module, *arguments in (
        ("sft", f"model.path={tiny_model_dir}", f"data={digits_dir / 'sft.parquet'}"),
        (
            "train",
            f"model.path={tmp_path / 'digits_sft/run/hf'}",
            f"data.train={digits_dir / 'train.parquet'}",
            f"data.heldout={digits_dir / 'heldout.parquet'}",
        ),
    ):
        command = [sys.executable, "-m", f"megatron_mmr1.{module}", f"output_dir={tmp_path}"]
        subprocess.run([*command, "run=run", *arguments], check=True)
    evaluated = [
        row["eval/accuracy_sampled"]
        for row in read_metrics(tmp_path / "digits/run")
        if row.get("eval/accuracy_sampled") is not None
    ]
    assert evaluated[-1] - evaluated[0] > 0.05
