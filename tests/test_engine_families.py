"""The engine and the trainer agree on every family that rolls out: an engine for each, so slow.

`make test-slow`. Qwen2.5-VL, in depth: test_engine.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("engine_cases.py")
WITH_IMAGES = ["qwen2_vl", "qwen3_vl"]
TEXT = ["qwen2", "qwen3", "qwen3_moe", "llama", "llama_sentencepiece", "mistral_sentencepiece"]


@pytest.mark.parametrize("name", [*WITH_IMAGES, *TEXT])
def test_engine_and_trainer_give_the_same_logprobs(name: str, tmp_path: Path):
    """In a process of its own: vLLM does not give back what an engine took."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
