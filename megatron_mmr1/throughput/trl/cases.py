"""The batches that both sides train on, and the models: made from a seed, the same in any process.

What the tokens say does not matter to how fast they are trained: responses are random tokens, of
lengths that vary as sampled ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GROUP_SIZE = 8
# Of the larger model. A step of its batch takes seconds on one core.
LARGER_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model folder and one batch of GRPO.

    Attributes:
        questions: of each prompt; with one `<image>` tag an image where `images` has some.
        images: PNG files of each prompt.
        token_ids: of each prompt, where it is no text that a template renders; else None.
        responses: token ids, prompts x responses.
        rewards: likewise.
    """

    model: Path
    questions: list[str]
    images: list[list[bytes]]
    token_ids: list[list[int]] | None
    responses: list[list[list[int]]]
    rewards: list[list[float]]


def digits(folder: Path) -> Case:
    """32 prompts of the embedded task with their images, the tiny Qwen2.5-VL, short responses."""
    import pyarrow.parquet as pq

    from megatron_mmr1.data.digits import build_digits
    from megatron_mmr1.data.tiny_model import SPECIAL_TOKENS, build_tiny_qwen2_5_vl

    model, data = folder / "tiny_qwen2_5_vl", folder / "digits"
    if not model.exists():
        build_tiny_qwen2_5_vl(model)
        build_digits(data, num_train=64, num_heldout=8, num_demonstrations=8)
    rows = pq.read_table(data / "train.parquet").to_pylist()[:32]
    lengths = _lengths(len(rows), 16, 0.5, 4, 32, seed=1)
    first = len(SPECIAL_TOKENS)
    return Case(
        model,
        [row["problem"] for row in rows],
        [[image["bytes"] for image in row["images"]] for row in rows],
        None,
        _responses(lengths, first, first + 20),
        _rewards(len(rows)),
    )


def larger(folder: Path) -> Case:
    """4 prompts of text, a Qwen2 of 8 layers and hidden size 256, 100 to 400 tokens each."""
    model = folder / "qwen2_8_layers"
    if not model.exists():
        _build_larger(model)
    prompt_lengths = np.random.default_rng(2).integers(60, 120, 4)
    generator = np.random.default_rng(3)
    first, last = 100, LARGER_SIZES["vocab_size"]
    return Case(
        model,
        [f"prompt {number}" for number in range(len(prompt_lengths))],
        [[] for _ in prompt_lengths],
        [generator.integers(first, last, n).tolist() for n in prompt_lengths],
        _responses(_lengths(len(prompt_lengths), 130, 0.6, 20, 300, seed=4), first, last),
        _rewards(len(prompt_lengths)),
    )


CASES: dict[str, Callable[[Path], Case]] = {"digits": digits, "larger": larger}


def _lengths(
    num_prompts: int, mean: float, sigma: float, shortest: int, longest: int, seed: int
) -> list[list[int]]:
    """Lognormal, cut: a few responses are several times as long as most."""
    normal = np.random.default_rng(seed).standard_normal((num_prompts, GROUP_SIZE))
    tokens = mean * np.exp(sigma * normal - sigma**2 / 2)
    return np.clip(np.rint(tokens), shortest, longest).astype(int).tolist()


def _responses(lengths: list[list[int]], first: int, last: int) -> list[list[list[int]]]:
    generator = np.random.default_rng(5)
    return [[generator.integers(first, last, n).tolist() for n in group] for group in lengths]


def _rewards(num_prompts: int) -> list[list[float]]:
    """0, 1 or 2, as format and accuracy add up to."""
    generator = np.random.default_rng(6)
    return generator.integers(0, 3, (num_prompts, GROUP_SIZE)).astype(float).tolist()


def _build_larger(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

    from megatron_mmr1.data import tiny_model
    from megatron_mmr1.data import tiny_processors as processors

    def write(temporary: Path) -> None:
        _, ids = processors.write_qwen_text(temporary)
        ends: dict[str, Any] = {
            key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        config = Qwen2Config(
            **LARGER_SIZES,
            **ends,
            max_position_embeddings=tiny_model.MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            dtype="float32",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float()
        model.generation_config = GenerationConfig(**ends, do_sample=True)
        model.save_pretrained(temporary)

    tiny_model.write_folder(folder, write)
