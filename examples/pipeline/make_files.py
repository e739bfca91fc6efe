"""Write the embedded digits task in the forms that MMR1's own files have, small enough for a CPU.

Usage: python examples/pipeline/make_files.py FOLDER [--demonstrations 2000] [--prompts 400]

sft.json          the cold start: ShareGPT conversations, images as paths (LLaMA-Factory's form)
sft_held_out.jsonl  the same form, a record a line: validation loss
rl.parquet        MMR1-RL's columns: problem, answer, images as {bytes, path}
held_out.jsonl    the same keys, a record a line, images as paths
mathvista.parquet MathVista testmini's columns: whole-number answers, and four options
chartqa.parquet   ChartQA's columns
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_mmr1.data.digits import build_digits

NUM_HELD_OUT = 80
_IMAGE_TAG = "<image>"


def main() -> None:
    """Draw the questions and write the files."""
    parser = argparse.ArgumentParser(description="Write small files in the forms of MMR1's.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--demonstrations", type=int, default=2000)
    parser.add_argument("--prompts", type=int, default=400)
    options = parser.parse_args()
    make_files(options.folder, options.demonstrations, options.prompts)
    print(f"{options.folder}: {', '.join(sorted(p.name for p in options.folder.iterdir()))}")


def make_files(folder: Path, num_demonstrations: int, num_prompts: int) -> None:
    """Write all files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn:
        build_digits(
            Path(drawn),
            num_train=num_prompts,
            num_heldout=NUM_HELD_OUT,
            num_demonstrations=num_demonstrations,
        )
        rows = {
            name: pq.read_table(Path(drawn) / f"{name}.parquet").to_pylist()
            for name in ("sft", "train", "heldout")
        }
    conversations = [
        {
            "conversations": row["conversations"],
            "images": _paths(folder, f"sft_{number}", row["images"]),
        }
        for number, row in enumerate(rows["sft"])
    ]
    num_validation = max(8, num_demonstrations // 20)
    (folder / "sft.json").write_text(json.dumps(conversations[num_validation:]))
    _write_lines(folder / "sft_held_out.jsonl", conversations[:num_validation])
    keys = ("problem", "answer", "images")
    table = pa.Table.from_pylist([{key: row[key] for key in keys} for row in rows["train"]])
    pq.write_table(table, folder / "rl.parquet")
    held_out = rows["heldout"]
    _write_lines(
        folder / "held_out.jsonl",
        (
            {"problem": row["problem"], "answer": row["answer"]}
            | {"images": _paths(folder, f"held_out_{number}", row["images"])}
            for number, row in enumerate(held_out)
        ),
    )
    pq.write_table(
        pa.Table.from_pylist([_mathvista(n, row) for n, row in enumerate(held_out)]),
        folder / "mathvista.parquet",
    )
    pq.write_table(
        pa.Table.from_pylist([_chartqa(row) for row in held_out]), folder / "chartqa.parquet"
    )


def _mathvista(number: int, row: dict[str, Any]) -> dict[str, Any]:
    """A free question, or every second one with four options."""
    answer = int(row["answer"])
    choices = [str(answer + step) for step in (-1, 0, 1, 2)] if number % 2 else None
    kind = ("multi_choice", "text") if choices else ("free_form", "integer")
    return {
        "pid": str(number + 1),
        "question": _question(row),
        "image": f"images/{number + 1}.jpg",
        "decoded_image": row["images"][0],
        "choices": choices,
        "unit": None,
        "precision": None,
        "answer": row["answer"],
        "question_type": kind[0],
        "answer_type": kind[1],
        "metadata": {"task": "digits", "skills": ["arithmetic reasoning"]},
        "query": "",
    }


def _chartqa(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": row["images"][0],
        "query": _question(row),
        "label": [row["answer"]],
        "human_or_machine": 0,
    }


def _question(row: dict[str, Any]) -> str:
    return row["problem"].replace(_IMAGE_TAG, "").strip()


def _paths(folder: Path, name: str, images: list[dict[str, Any]]) -> list[str]:
    """Write image files; return their paths, relative to the folder."""
    paths = []
    for place, image in enumerate(images):
        path = f"images/{name}_{place}.png"
        (folder / path).write_bytes(image["bytes"])
        paths.append(path)
    return paths


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
