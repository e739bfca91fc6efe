"""`rollouts/step_NNNNNN.jsonl`: every response of a step, one JSON object a group.

Enough to read what the model said, and to train on the same rollouts again: Python writes a float
so that reading it gives the same float, so log-probabilities survive exactly.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mmr1.observability.files import iter_lines, replacing

if TYPE_CHECKING:
    from megatron_mmr1.types import Rollout, ScoredGroup, ScoredRollout


def rollouts_path(run_dir: Path | str, step: int) -> Path:
    """Where the rollouts of `step` are kept."""
    return Path(run_dir) / "rollouts" / f"step_{step:06d}.jsonl"


def write_rollouts(
    run_dir: Path | str,
    step: int,
    groups: Sequence[ScoredGroup],
    discarded: Sequence[ScoredGroup] = (),
) -> None:
    """Write the step's groups; the file appears complete or not at all.

    Args:
        discarded: generated for the step, and not trained on.
    """
    with (
        replacing(rollouts_path(run_dir, step)) as temporary,
        temporary.open("w", encoding="ascii", newline="\n") as file,
    ):
        for kept, is_discarded in ((groups, False), (discarded, True)):
            for group in kept:
                record = group_record(step, group) | {"is_discarded": is_discarded}
                file.write(json.dumps(record, allow_nan=False) + "\n")


def iter_rollouts(run_dir: Path | str, step: int) -> Iterator[dict[str, Any]]:
    """Yield a step's groups one at a time (a large step is hundreds of megabytes)."""
    return (json.loads(line) for line in iter_lines(rollouts_path(run_dir, step)))


def read_rollouts(run_dir: Path | str, step: int) -> list[dict[str, Any]]:
    """Return a step's groups as they were written."""
    return list(iter_rollouts(run_dir, step))


def rollout_steps(run_dir: Path | str) -> list[int]:
    """Return the steps whose rollouts were kept, in order."""
    files = (Path(run_dir) / "rollouts").glob("step_*.jsonl")
    return sorted(int(path.stem.removeprefix("step_")) for path in files)


def truncate_rollouts(run_dir: Path, step: int) -> None:
    """Delete the files of steps after `step`."""
    for later in rollout_steps(run_dir):
        if later > step:
            rollouts_path(run_dir, later).unlink()


def group_record(step: int, scored: ScoredGroup) -> dict[str, Any]:
    """Return one group as the JSON object that is kept of it."""
    prompt = scored.group.prompt
    pairs = zip(scored.group.rollouts, scored.scores, strict=True)
    return {
        "step": step,
        "prompt_id": prompt.prompt_id,
        "occurrence": prompt.occurrence,
        "category": prompt.category,
        "question": prompt.question,
        "answer": prompt.answer,
        "weight_version": scored.group.weight_version,
        "images": [base64.b64encode(image).decode("ascii") for image in prompt.images],
        "rollouts": [_rollout_record(rollout, score) for rollout, score in pairs],
    }


def _rollout_record(rollout: Rollout, score: ScoredRollout) -> dict[str, Any]:
    return {
        "sample_index": rollout.sample_index,
        "text": rollout.text,
        "token_ids": list(rollout.token_ids),
        "rollout_logprobs": list(rollout.rollout_logprobs),
        "finish_reason": rollout.finish_reason,
        "outcome": score.verdict.outcome,
        "reason": score.verdict.reason,
        "is_well_formed": score.is_well_formed,
        "reward": None if math.isnan(score.reward) else score.reward,
    }
