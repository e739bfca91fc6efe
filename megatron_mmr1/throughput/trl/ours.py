"""Our side: `python -m megatron_mmr1.throughput.trl.ours CASE FOLDER MAX_TOKENS`.

Builds the batch and takes the optimizer step by the functions that training uses.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_mmr1.throughput.trl import turn
from megatron_mmr1.throughput.trl.cases import CASES, Case


def main(name: str, folder: str, max_tokens: str) -> None:
    """Take steps as long as they are asked for."""
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.backend import batching, losses, parallel
    from megatron_mmr1.backend.plan import Packing
    from megatron_mmr1.backend.policy import MegatronPolicy
    from megatron_mmr1.config.schema import (
        AlgorithmConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
    )
    from megatron_mmr1.data.processor import PromptProcessor
    from megatron_mmr1.kernels.contract import SoftmaxRule

    case = CASES[name](Path(folder))
    parallel.initialize(ParallelConfig(), seed=0)
    processor = PromptProcessor(case.model)
    policy = MegatronPolicy(
        ModelConfig(str(case.model)), ParallelConfig(), OptimizerConfig(lr=1e-6), num_steps=1000
    )
    builder = batching.StepBuilder(
        Packing.at(ParallelConfig(), int(max_tokens)),
        policy.cost,
        batching.ImageTokens.of(processor),
    )
    loss, rule = losses.grpo(AlgorithmConfig()), SoftmaxRule(1.0, ())
    samples = _samples(case, processor)
    while turn.wait():
        start, start_cpu = time.perf_counter(), time.process_time()
        step, plan = builder.build([batching.size_of(s) for s in samples], samples.__getitem__)
        metrics = policy.train_step(step, loss, rule)
        turn.report(
            {
                "train_s": time.perf_counter() - start,
                "train_cpu_s": time.process_time() - start_cpu,
                "tokens": sum(s.num_tokens for s in map(batching.size_of, samples)),
                "positions": sum(len(batch.token_ids_T) for batch in step.micro_batches),
                "micro_batches": plan.metrics()["packing/micro_batches"],
                "loss": metrics["loss"],
                "grad_norm": metrics["grad_norm"],
            }
            | policy.clock.pop()
        )
    parallel.finalize()


def _samples(case: Case, processor: object) -> list:
    """The batch's sequences; engine log-probs are not used."""
    import torch

    from megatron_mmr1.backend.batching import Sample
    from megatron_mmr1.data.processor import PromptProcessor
    from megatron_mmr1.types import Prompt

    assert isinstance(processor, PromptProcessor)
    samples = []
    for number, question in enumerate(case.questions):
        if case.token_ids is None:
            prompt = processor.prompt(str(number), question, case.images[number])
        else:
            token_ids = torch.tensor(case.token_ids[number])
            positions = torch.arange(len(token_ids)).expand(3, -1)
            prompt = Prompt(str(number), token_ids, positions, None, None, "", "", question, ())
        for response, reward in zip(case.responses[number], case.rewards[number], strict=True):
            samples.append(
                Sample(prompt, torch.tensor(response), torch.zeros(len(response)), reward)
            )
    return samples


if __name__ == "__main__":
    main(*sys.argv[1:])
