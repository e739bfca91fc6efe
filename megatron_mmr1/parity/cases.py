"""What is compared: prompts and responses of several kinds, made for any model folder."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from megatron_mmr1.backend.batching import Sample
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.parity.layouts import BATCH_KINDS

_TEXT = "Read the digits."
GROUP_SIZE = 3
MAX_RESPONSE_TOKENS = 12


def make_samples(kind: str, processor: PromptProcessor, seed: int = 0) -> list[Sample]:
    """Random responses of unequal lengths and rewards to the prompts of one kind of batch.

    Everything depends on the arguments alone: every process makes the same samples. One response
    of the first prompt could not be judged.
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(
        sorted(set(range(len(processor.tokenizer))) - set(processor.banned_token_ids))
    )
    samples = []
    for number, sizes in enumerate(BATCH_KINDS[kind]):
        pictures = [_noise(w, h, 10 * number + i) for i, (w, h) in enumerate(sizes)]
        prompt = processor.prompt(f"{kind}-{number}", "<image>" * len(sizes) + _TEXT, pictures)
        for index in range(GROUP_SIZE):
            length = int(torch.randint(1, MAX_RESPONSE_TOKENS + 1, (), generator=generator))
            picks = torch.randint(len(allowed), (length,), generator=generator)
            samples.append(
                Sample(
                    prompt,
                    allowed[picks],
                    -4.0 + torch.rand(length, generator=generator),
                    float("nan") if (number, index) == (0, 1) else _reward(generator),
                )
            )
    return samples


def _reward(generator: torch.Generator) -> float:
    return float(torch.randn((), generator=generator))


def _noise(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
