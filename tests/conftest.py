"""Fixtures shared by the tests: the tiny model and the digits data, built once a session."""

import os

# Before torch or transformers are imported by any test.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen2.5-VL in Hugging Face format. Read only: it is shared."""
    from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

    return build_tiny_qwen2_5_vl(tmp_path_factory.mktemp("models") / "tiny_qwen2_5_vl")


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, heldout and sft.parquet, smaller than the defaults. Read only: it is shared."""
    from megatron_mmr1.data.digits import build_digits

    folder = tmp_path_factory.mktemp("digits")
    build_digits(folder, num_train=200, num_heldout=100, num_demonstrations=200)
    return folder
