"""Score a Hugging Face folder on a benchmark:
`python -m megatron_mmr1.evaluate benchmark=digits model=DIR`.

Greedy at rollout.temperature=0, otherwise sampled. One process; prints accuracy by category, and
writes every response with its verdict when `output=FILE.jsonl` is given.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_mmr1.cli import load_config, run_main
from megatron_mmr1.config.schema import EvaluateConfig
from megatron_mmr1.config.validate import validate_evaluate


def main() -> None:
    """Check, generate, judge, print."""
    config = load_config(EvaluateConfig, "evaluate", sys.argv[1:])
    validate_evaluate(config)

    from megatron_mmr1 import device

    device.prepare_process()
    from rich.console import Console
    from rich.table import Table

    from megatron_mmr1.data.loader import PromptView
    from megatron_mmr1.data.processor import PromptProcessor
    from megatron_mmr1.evaluation import accuracy
    from megatron_mmr1.evaluation.benchmarks import BENCHMARKS
    from megatron_mmr1.observability.rollouts import group_record
    from megatron_mmr1.rewards import VerifierPool
    from megatron_mmr1.rollout.engine import Sampling
    from megatron_mmr1.rollout.vllm_engine import VllmEngine

    processor = PromptProcessor(config.model)
    dataset = BENCHMARKS[config.benchmark](config.data, processor)
    for row in dataset.bad_rows:
        print(f"bad row {row.row_id!r} set aside: {row.reason}", file=sys.stderr)
    prompts = PromptView.of(dataset, range(len(dataset)))
    rollout = config.rollout
    engine = VllmEngine(
        config.model,
        config.dtype,
        rollout,
        processor.banned_token_ids,
        max(size.num_prompt_tokens for size in dataset.sizes),
    )
    sampling = Sampling(
        config.samples_per_prompt,
        rollout.temperature,
        rollout.max_response_tokens,
        config.seed,
        step=0,
    )
    with VerifierPool(config.reward) as verifier:
        groups = accuracy.generate_and_judge(engine, verifier, prompts, sampling)
    scores = accuracy.accuracy(accuracy.judged(groups), "accuracy")
    how = "greedy" if rollout.temperature == 0 else f"sampled at T={rollout.temperature:g}"
    print(f"{config.benchmark}: {len(prompts)} prompts, {how}")
    table = Table("", "accuracy")
    unjudged = int(scores.pop("accuracy_unjudged", 0))
    for name, value in scores.items():
        table.add_row(name.removeprefix("accuracy/"), f"{value:.1%}")
    Console().print(table)
    if unjudged:
        print(f"{unjudged} responses could not be judged; they are in no denominator")
    if config.output:
        lines = [json.dumps(group_record(0, group)) for group in groups]
        Path(config.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"responses: {config.output}")


if __name__ == "__main__":
    run_main(main)
