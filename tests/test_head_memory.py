"""The output layer's memory against the plain way's, at a real vocabulary: the tool's own gates.

A minute and 5 GB. Not smaller: a chunk of logits has 128 MiB at any size, and only beside a whole
matrix of logits and a real weight is that little.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "measure_head_memory.py"


@pytest.fixture(scope="module")
def measured() -> tuple[int, dict[str, Any]]:
    """The tool's exit status and result."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_head_needs_half_a_weight_gradient_and_a_fifteenth_of_the_plain_way(measured: Any):
    status, result = measured
    assert result["is_same"], result  # the plain way gives the same gradients
    assert result["ours_of_weight_gradient"] <= 1.5, result
    assert result["saving"] >= 15.0, result
    assert status == 0


def test_the_plain_way_fails_both_gates(measured: Any, monkeypatch: pytest.MonkeyPatch):
    """Negative control: were the whole logits kept on our side, the tool would say so."""
    monkeypatch.syspath_prepend(TOOL.parent)
    from measure_head_memory import judge

    _, result = measured
    plain, gradient_bytes = result["plain"], result["weight_gradient_bytes"]
    found = judge(plain, plain, gradient_bytes)
    assert found["is_same"] and not found["holds"]
    assert found["ours_of_weight_gradient"] > 1.5 and found["saving"] < 15.0
    others = result["ours"] | {"weight_gradient_norm": 1.01 * plain["weight_gradient_norm"]}
    assert not judge(others, plain, gradient_bytes)["holds"]
