r"""The embedded task: arithmetic on handwritten digits, small enough to train on two CPU cores.

Owns the questions, the images and the three parquet files; does not own the model (tiny_model.py)
or the reading of the files (dataset.py). The scans are scikit-learn's `load_digits` (1,797 scans of
8 x 8, part of the package: nothing is downloaded). A third of the scans is held out, the same third
for every seed, so that held-out prompts show digits that neither the cold start nor the RL pool has
seen.

A prompt is ONE image of k tiles side by side (28 x 28k pixels, so k visual tokens) and a question.
A level is an operation and k; it is the row's `category`:

    read3    Read the digits.   <think>3,5,1</think><answer>\boxed{351}</answer>
    max3     Largest digit?     <think>max(3,5,1)=5</think><answer>\boxed{5}</answer>
    sum2     Sum?               <think>3+5=8</think><answer>\boxed{8}</answer>
    prod2    Product?           <think>3*5=15</think><answer>\boxed{15}</answer>
    sumsq2   Sum of squares?    <think>3^2+5^2=34</think><answer>\boxed{34}</answer>

Usage: python -m megatron_mmr1.data.digits --out data/digits --model models/tiny_qwen2_5_vl
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TILE_PIXELS = 28
SCAN_PIXELS = 24  # a scan inside its tile: 8 x 8 enlarged three times, with a margin of 2
SPLIT_SEED = 20250926  # of the held-out third; never varies
SETTINGS_KEY = b"megatron_mmr1.digits"


@dataclass(frozen=True, slots=True)
class Operation:
    """A question about digits: its text, the working that is shown, and the result."""

    question: str
    working: Callable[[list[int]], str]
    result: Callable[[list[int]], str]


def _join(separator: str, digits: list[int], suffix: str = "") -> str:
    return separator.join(f"{digit}{suffix}" for digit in digits)


# The working of "read" has no "=": its result is the digits themselves, not computed from them.
OPERATIONS = {
    "read": Operation("Read the digits.", lambda d: _join(",", d), lambda d: _join("", d)),
    "max": Operation("Largest digit?", lambda d: f"max({_join(',', d)})=", lambda d: str(max(d))),
    "min": Operation("Smallest digit?", lambda d: f"min({_join(',', d)})=", lambda d: str(min(d))),
    "sum": Operation("Sum?", lambda d: f"{_join('+', d)}=", lambda d: str(sum(d))),
    "prod": Operation("Product?", lambda d: f"{_join('*', d)}=", lambda d: str(math.prod(d))),
    "sumsq": Operation(
        "Sum of squares?",
        lambda d: f"{_join('+', d, '^2')}=",
        lambda d: str(sum(digit**2 for digit in d)),
    ),
}

LEVELS = (
    "read1",
    "read3",
    "max3",
    "max5",
    "min3",
    "sum2",
    "sum3",
    "prod2",
    "sumsq2",
    "sumsq4",
)
# Relative weights. The pool holds what a cold start solves (read, max), what it half solves (sums,
# products of two) and what it hardly solves (sum3, sumsq4): the mix in which choosing matters.
POOL_MIX = {level: 1.0 for level in LEVELS}
# The cold start never shows sumsq4.
SFT_MIX = {level: 0.0 if level == "sumsq4" else 1.0 for level in LEVELS}

IMAGES_TYPE = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
PROMPT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        ("problem", pa.string()),
        ("answer", pa.string()),
        ("images", IMAGES_TYPE),
    ]
)
SFT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("category", pa.string()),
        (
            "conversations",
            pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
        ),
        ("images", IMAGES_TYPE),
    ]
)


@dataclass(frozen=True, slots=True)
class Question:
    """One drawn question: which scans, which digits they show, and what is asked."""

    level: str
    scans: tuple[int, ...]
    digits: list[int]

    @property
    def operation(self) -> Operation:
        """What the level asks for."""
        return _parse_level(self.level)[0]

    @property
    def answer(self) -> str:
        """The gold answer."""
        return self.operation.result(self.digits)


def build_digits(
    folder: Path,
    seed: int = 0,
    num_train: int = 1500,
    num_heldout: int = 300,
    num_demonstrations: int = 4000,
    train_mix: Mapping[str, float] = POOL_MIX,
    sft_mix: Mapping[str, float] = SFT_MIX,
    sft_noise: float = 0.5,
    force: bool = False,
) -> list[Path]:
    """Write train.parquet, heldout.parquet and sft.parquet into `folder`.

    Each file records its settings. A file that has the same settings already is left alone; any
    other is written to a temporary name and renamed. The same settings give the same bytes.

    Args:
        folder: made when missing.
        seed: of every draw of scans, levels and mistakes (not of the train and held-out split).
        num_train: prompts in the RL pool, from the training scans.
        num_heldout: held-out prompts, from the unseen scans, as even over the levels as possible.
        num_demonstrations: cold-start rows, from the training scans.
        train_mix: relative weight of each level in the RL pool; a level left out has weight 0.
        sft_mix: relative weight of each level in the cold start; weight 0 holds a level out.
        sft_noise: probability that a cold-start row's computed result is wrong (one of its digits
            is replaced by another), in the working and in the box alike, as scraped reasoning data
            often is. "read" rows compute nothing and stay right. A policy that imitates this set is
            unsure of its arithmetic, but right more often than any one wrong answer: what GRPO can
            then sharpen.
        force: write every file again.

    Returns:
        The files that were written (not those left alone).

    Raises:
        ValueError: an unknown level, a mix without weight, or a noise outside [0, 1].
    """
    if not 0 <= sft_noise <= 1:
        raise ValueError(f"sft_noise={sft_noise} is no probability; give a number from 0 to 1")
    evenly = dict.fromkeys(LEVELS, 1.0)
    # (file, schema, number of rows, mix, held-out scans?, noise, its own random stream)
    files = [
        ("train", PROMPT_SCHEMA, num_train, train_mix, False, 0.0, 1),
        ("heldout", PROMPT_SCHEMA, num_heldout, evenly, True, 0.0, 2),
        ("sft", SFT_SCHEMA, num_demonstrations, sft_mix, False, sft_noise, 3),
    ]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, schema, num_rows, mix, is_heldout, noise, stream in files:
        path = folder / f"{name}.parquet"
        # Raise the version when this file changes what it writes.
        settings = {
            "version": 1,
            "seed": seed,
            "num_rows": num_rows,
            "mix": dict(mix),
            "noise": noise,
        }
        if not force and _recorded_settings(path) == settings:
            continue
        rng = np.random.default_rng([seed, stream])
        questions = _draw_questions(rng, num_rows, mix, scan_split()[is_heldout])
        to_row = _prompt_row if schema is PROMPT_SCHEMA else _demonstration_row
        rows = [to_row(f"{name}-{i:05d}", q, rng, noise) for i, q in enumerate(questions)]
        _write_parquet(path, pa.Table.from_pylist(rows, schema=schema), settings)
        written.append(path)
    return written


def scan_split() -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training scans and of the held-out third; the same for every seed."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(_load_scans()[1]))
    num_heldout = len(order) // 3
    return order[num_heldout:], order[:num_heldout]


@cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Tiles as uint8 [1797, 28, 28], dark ink on white paper, and their digits as int64 [1797]."""
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    tiles = np.full((len(scans.target), TILE_PIXELS, TILE_PIXELS), 255, dtype=np.uint8)
    margin = (TILE_PIXELS - SCAN_PIXELS) // 2
    inside = slice(margin, margin + SCAN_PIXELS)
    for tile, scan in zip(tiles, scans.images, strict=True):
        paper = Image.fromarray((255 - scan * (255 / 16)).round().astype(np.uint8))
        enlarged = paper.resize((SCAN_PIXELS, SCAN_PIXELS), Image.Resampling.BILINEAR)
        tile[inside, inside] = np.asarray(enlarged)
    return tiles, scans.target


def _parse_level(level: str) -> tuple[Operation, int]:
    """The operation and the number of digits that a level's name stands for."""
    match = re.fullmatch(r"([a-z]+)([1-9])", level)
    if match is None or match[1] not in OPERATIONS:
        raise ValueError(
            f"unknown level {level!r}; use one of {', '.join(OPERATIONS)} and a number of digits "
            "from 1 to 9, such as sum3"
        )
    return OPERATIONS[match[1]], int(match[2])


def _draw_questions(
    rng: np.random.Generator, num_questions: int, mix: Mapping[str, float], scans: np.ndarray
) -> list[Question]:
    """Draw questions in random order; level counts follow `mix` exactly (largest remainders)."""
    targets = _load_scans()[1]
    questions = []
    for level, count in _counts(num_questions, mix).items():
        hands = _deal(rng, scans, _parse_level(level)[1])
        for _, hand in zip(range(count), hands, strict=False):
            questions.append(Question(level, tuple(hand), [int(targets[scan]) for scan in hand]))
    return [questions[i] for i in rng.permutation(len(questions))]


def _counts(total: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to `total`, in proportion to `mix`."""
    weight = sum(mix.values())
    if weight <= 0 or min(mix.values()) < 0:
        raise ValueError(f"the level mix {dict(mix)} has no weight, or a negative one")
    shares = {level: total * part / weight for level, part in mix.items()}
    counts = {level: math.floor(share) for level, share in shares.items()}
    by_remainder = sorted(shares, key=lambda level: counts[level] - shares[level])
    for level in by_remainder[: total - sum(counts.values())]:
        counts[level] += 1
    return counts


def _deal(rng: np.random.Generator, scans: np.ndarray, k: int) -> Iterator[list[int]]:
    """Deal k scans at a time from a shuffled deck, for ever: every scan is used about as often."""
    while True:
        deck = rng.permutation(scans).tolist()
        for start in range(0, len(deck) - k + 1, k):
            yield deck[start : start + k]


def _prompt_row(
    row_id: str, question: Question, rng: np.random.Generator, noise: float
) -> dict[str, Any]:
    """A row of MMR1-RL's schema, with an id and a category."""
    return {
        "id": row_id,
        "category": question.level,
        "problem": f"<image>{question.operation.question}",
        "answer": question.answer,
        "images": [_encode_image(question)],
    }


def _demonstration_row(
    row_id: str, question: Question, rng: np.random.Generator, noise: float
) -> dict[str, Any]:
    """A ShareGPT row; its result is wrong with probability `noise`."""
    working, result = question.operation.working(question.digits), question.answer
    if working.endswith("="):
        if rng.random() < noise:
            result = _replace_one_digit(rng, result)
        working += result
    response = f"<think>{working}</think><answer>\\boxed{{{result}}}</answer>"
    return {
        "id": row_id,
        "category": question.level,
        "conversations": [
            {"from": "human", "value": f"<image>{question.operation.question}"},
            {"from": "gpt", "value": response},
        ],
        "images": [_encode_image(question)],
    }


def _replace_one_digit(rng: np.random.Generator, number: str) -> str:
    """Another number of the same length that differs in one digit and has no leading zero."""
    place = int(rng.integers(len(number)))
    has_no_zero = place == 0 and len(number) > 1
    others = [d for d in "0123456789"[has_no_zero:] if d != number[place]]
    return number[:place] + others[int(rng.integers(len(others)))] + number[place + 1 :]


def _encode_image(question: Question) -> dict[str, Any]:
    """One grey PNG of the tiles side by side."""
    pixels = np.concatenate([_load_scans()[0][scan] for scan in question.scans], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    # The path is a name only: it tells a person which scans these are.
    name = "-".join(str(scan) for scan in question.scans)
    return {"bytes": buffer.getvalue(), "path": f"scans-{name}.png"}


def _recorded_settings(path: Path) -> dict[str, Any] | None:
    """The settings that a file was written with; None when there is no such file."""
    if not path.is_file():
        return None
    recorded = (pq.read_schema(path).metadata or {}).get(SETTINGS_KEY)
    return json.loads(recorded) if recorded else None


def _write_parquet(path: Path, table: pa.Table, settings: dict[str, Any]) -> None:
    """Write with the settings recorded, under a temporary name, then rename."""
    metadata = {SETTINGS_KEY: json.dumps(settings, sort_keys=True).encode()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table.replace_schema_metadata(metadata), temporary)
    os.replace(temporary, path)


def main() -> None:
    """Write the data set and the tiny model, whatever of them is missing."""
    from megatron_mmr1.data.tiny_model import build_tiny_qwen2_5_vl

    parser = argparse.ArgumentParser(
        prog="python -m megatron_mmr1.data.digits", description="Write the embedded digits task."
    )
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="data folder")
    parser.add_argument(
        "--model", type=Path, default=Path("models/tiny_qwen2_5_vl"), help="model folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="write again what is complete")
    arguments = parser.parse_args()

    written = build_digits(arguments.out, arguments.seed, force=arguments.force)
    for name in ("train", "heldout", "sft"):
        path = arguments.out / f"{name}.parquet"
        num_rows = pq.read_metadata(path).num_rows
        print(f"{'wrote' if path in written else 'kept '} {path}: {num_rows:,} rows")
    is_missing = not (arguments.model / "config.json").is_file()
    if arguments.force or is_missing:
        build_tiny_qwen2_5_vl(arguments.model, arguments.seed)
    print(f"{'wrote' if arguments.force or is_missing else 'kept '} {arguments.model}")


if __name__ == "__main__":
    main()
