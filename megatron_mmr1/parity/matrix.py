"""Runs the check: one launch for each number of processes, Hugging Face in the first.

Starts processes and reads what they write; imports nothing heavy itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mmr1.parity.layouts import Control, Layout

LIMIT_S = 3600


@dataclass(frozen=True, slots=True)
class Cell:
    """One comparison, or several kinds of batches at one layout.

    Attributes:
        folder: of the model.
        control: the deliberate mistake ("" for none).
    """

    layout: Layout
    folder: str
    control: str = ""


@dataclass(frozen=True, slots=True)
class Compared:
    """One kind of batch at one layout, as the worker reported it.

    Attributes:
        is_bit_for_bit: the weights, exported again, are the model's files.
        hugging_face, one_process: `outcome.Difference` as a dict; None where it was not measured.
        error, hugging_face_error: mean log-prob errors in another dtype than float32.
    """

    cell: Cell
    kind: str
    is_bit_for_bit: bool
    hugging_face: dict[str, Any] | None = None
    one_process: dict[str, Any] | None = None
    error: float | None = None
    hugging_face_error: float | None = None


def cells_of(
    layouts: Sequence[Layout], controls: Sequence[Control], folder_of: Callable[[Layout], str]
) -> list[Cell]:
    """Give each layout its model's folder."""
    cells = [Cell(layout, folder_of(layout)) for layout in layouts]
    return cells + [Cell(c.layout, folder_of(c.layout), c.name) for c in controls]


def run_matrix(
    cells: Sequence[Cell], folder: Path, on_progress: Callable[[int], None] = lambda done: None
) -> list[Compared]:
    """Compare every cell; returns them in the order of the cells.

    Args:
        folder: for references, results and logs; must exist.
        on_progress: called with the number of comparisons done.

    Raises:
        RuntimeError: a launch failed; the message has the end of its log.
    """
    references = folder / "references"
    references.mkdir(exist_ok=True)
    sizes = sorted({1, *(cell.layout.num_ranks for cell in cells)})
    found: list[tuple[int, Compared]] = []
    for size in sizes:
        numbers = [n for n, cell in enumerate(cells) if cell.layout.num_ranks == size]
        job = {
            "references": str(references),
            "write_references": _references(cells) if size == 1 else [],
            "results": str(folder / f"results_{size}.jsonl"),
            "cells": [_as_job(cells[n], keeps=size == 1) for n in numbers],
        }
        path = folder / f"job_{size}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        before = len(found)
        _launch(size, path, folder, lambda done, before=before: on_progress(before + done))
        for line in Path(job["results"]).read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            number = numbers[values.pop("cell")]
            found.append((number, Compared(cells[number], **values)))
    return [compared for _, compared in sorted(found, key=lambda pair: pair[0])]


def _references(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """What Hugging Face has to compute: each model's kinds of batches, and dtypes."""
    asked: dict[str, dict[str, Any]] = {}
    for cell in cells:
        entry = asked.setdefault(cell.folder, {"folder": cell.folder, "kinds": [], "dtypes": []})
        entry["kinds"] += [k for k in cell.layout.all_kinds if k not in entry["kinds"]]
        entry["dtypes"] += [d for d in [cell.layout.dtype] if d not in entry["dtypes"]]
    return list(asked.values())


def _as_job(cell: Cell, keeps: bool) -> dict[str, Any]:
    layout = cell.layout
    is_plain = layout.parallel.recompute == "none" and not layout.freeze_vision
    return {
        "folder": cell.folder,
        "parallel": asdict(layout.parallel),
        "max_tokens": layout.max_tokens,
        "kinds": list(layout.all_kinds),
        "dtype": layout.dtype,
        "freeze_vision": layout.freeze_vision,
        "control": cell.control,
        # The first plain layout of one process is what the others are held against.
        "keep": keeps and is_plain and not cell.control and layout.dtype == "float32",
    }


def _launch(num_ranks: int, job: Path, folder: Path, on_progress: Callable[[int], None]) -> None:
    results, log = folder / f"results_{num_ranks}.jsonl", folder / f"log_{num_ranks}.txt"
    results.unlink(missing_ok=True)
    module = ["-m", "megatron_mmr1.parity.worker", str(job)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), *module]
    # A caller's own process group must not be taken for this launch's.
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | inherited
    deadline = time.monotonic() + LIMIT_S
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if results.exists():
                    on_progress(len(results.read_bytes().splitlines()))
                time.sleep(0.5)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"the check on {num_ranks} processes failed; {log} ends:\n{end}")
