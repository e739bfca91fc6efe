"""Our GRPO step beside TRL's GRPOTrainer's: same model, batch and seeds, on this machine, in turns.

    python tools/compare_trl.py           # all of it; writes examples/throughput/trl.json
    python tools/compare_trl.py --only digits larger --repeats 5

`digits` and `larger`: the training step alone on the same responses, loss and gradient norm
compared first. `whole`: the whole step with a vLLM engine in the trainer's process, where TRL's
runs. One thread a side; the other side waits meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from megatron_mmr1.cli import run_main

GOAL = 1.5  # times TRL's tokens/s
# Micro-batches: ours of so many packed tokens; TRL's of so many sequences: the best counts.
SETTINGS = {"digits": (8192, (32, 128)), "larger": (4096, (4, 16))}
WHOLE_BATCH = 128


def main() -> None:
    """Compare, print, write; exit status 1 when the two sides do not compute the same."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*SETTINGS, "whole"],
                        default=[*SETTINGS, "whole"])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("examples/throughput/trl.json"))
    options = parser.parse_args()
    if options.repeats < 1 or options.warmup < 1:
        raise ValueError("--repeats and --warmup must be at least 1")
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TORCH_CPP_LOG_LEVEL="ERROR")

    from megatron_mmr1.throughput import hardware
    from megatron_mmr1.throughput.trl import report

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="compare-trl-") as scratch:
        for name in options.only:
            print(f"{name}:", flush=True)
            measure = _whole if name == "whole" else _training
            results[name] = measure(name, Path(scratch), options.repeats, options.warmup)
    record = {"machine": hardware.description(), "goal": GOAL, "repeats": options.repeats,
              "results": results}  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{report.markdown(record)}\n\n{options.json}")
    if any(result.get("disagreement") for result in results.values()):
        raise SystemExit(1)


def _training(name: str, scratch: Path, repeats: int, warmup: int) -> dict[str, Any]:
    from megatron_mmr1.throughput.trl import compare
    from megatron_mmr1.throughput.trl.cases import CASES

    CASES[name](scratch)  # the model's folder, before two processes write it
    entrants = compare.training_entrants(name, scratch, *SETTINGS[name])
    found = compare.compare(entrants, "train", repeats, warmup, scratch, _say)
    return found | {"phase": "train", "disagreement": compare.disagreement(found["first"])}


def _whole(name: str, scratch: Path, repeats: int, warmup: int) -> dict[str, Any]:
    """With TRL's own colocated vLLM; where its weight update fails, with ours in its place."""
    from megatron_mmr1.throughput.trl import compare
    from megatron_mmr1.throughput.trl.cases import digits

    digits(scratch)
    failures: dict[str, str] = {}
    for generation in ("vllm", "vllm_mended"):
        entrants = compare.whole_step_entrants(scratch, WHOLE_BATCH, generation)
        try:
            found = compare.compare(entrants, "step", repeats, warmup, scratch, _say)
        except RuntimeError as error:
            failures[generation] = _last_line(str(error))
            _say(f"  TRL, {generation}: {failures[generation]}")
            continue
        return found | {"phase": "step", "generation": generation, "failures": failures}
    return {"phase": "step", "failures": failures}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "Error" in line]
    return (lines or text.splitlines())[-1].removeprefix("[rank0]: ")


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    run_main(main)
