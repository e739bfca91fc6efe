"""Fixtures shared by the tests: the tiny model and the digits data, built once a session."""

import os
import shutil
import tempfile

# Before torch or transformers are imported by any test.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="megatron_mmr1_tests_")
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as device.prepare_process does on a CPU

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_sessionfinish() -> None:
    """Remove what data sets kept on disk."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised tiny Qwen2.5-VL in Hugging Face format. Read only: it is shared."""
    from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

    return build_tiny_qwen2_5_vl(tmp_path_factory.mktemp("models") / "tiny_qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, by its name in parity/models.py. Read only: it is shared."""
    from functools import cache

    from megatron_mmr1.parity.models import build_tiny

    folder = tmp_path_factory.mktemp("families")
    return cache(lambda name: build_tiny(name, folder / name))


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train, heldout and sft.parquet, smaller than the defaults. Read only: it is shared."""
    from megatron_mmr1.data.digits import build_digits

    folder = tmp_path_factory.mktemp("digits")
    build_digits(folder, num_train=200, num_heldout=100, num_demonstrations=200)
    return folder


@pytest.fixture(scope="session")
def tied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model whose output layer is its embedding. Read only: it is shared."""
    from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

    return build_tiny_qwen2_5_vl(
        tmp_path_factory.mktemp("models") / "tied", tie_word_embeddings=True
    )


@pytest.fixture(scope="session")
def tiny_processor(tiny_model_dir: Path) -> Any:
    """The tiny model's processor."""
    from megatron_mmr1.data.processor import PromptProcessor

    return PromptProcessor(tiny_model_dir)


@pytest.fixture(scope="session")
def process_group() -> None:
    """Megatron's parallel state in this process, a group of one, as in a run on one rank.

    It stays until the process ends: vLLM takes leave of its own groups only then.
    """
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import parallel
    from megatron_mmr1.config.schema import ParallelConfig

    environment = dict(os.environ)
    parallel.initialize(ParallelConfig(), seed=0)
    # RANK and MASTER_PORT are this group's: processes that tests start must not inherit them.
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def samples(tiny_processor: Any) -> Any:
    """Eight sequences of unequal lengths: four prompts (three with images), two responses each."""
    from helpers import mixed_prompts, scored_groups

    from megatron_mmr1.backend import batching

    groups = scored_groups(mixed_prompts(tiny_processor), tiny_processor)
    return batching.samples_of_groups(groups)


@pytest.fixture(scope="session")
def vllm_engine(tiny_model_dir: Path, tiny_processor: Any, process_group: None) -> Any:
    """One in-process vLLM engine of the tiny model. Tests push the weights that they want first."""
    from megatron_mmr1.config.schema import RolloutConfig
    from megatron_mmr1.rollout.vllm_engine import VllmEngine

    config = RolloutConfig(max_response_tokens=24, max_images_per_prompt=2, kv_cache_bytes=64 << 20)
    return VllmEngine(str(tiny_model_dir), "float32", config, tiny_processor.banned_token_ids, 64)
