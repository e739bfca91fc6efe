"""GRPO with Variance-Aware Sampling: the outer loop
(arXiv:2509.21268, section 4; facts of a step in types.py).

Composes the other rooms and contains no maths. A step that can't be trusted stops the run with its
reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import batched
from pathlib import Path

from megatron_mmr1.backend import batching, losses, parallel
from megatron_mmr1.backend.plan import StepPlan
from megatron_mmr1.config.schema import GrpoConfig
from megatron_mmr1.evaluation import accuracy
from megatron_mmr1.observability.progress import Progress
from megatron_mmr1.observability.step_metrics import group_metrics, group_sums
from megatron_mmr1.rollout.engine import RolloutEngine, Sampling
from megatron_mmr1.trainers.collect import (
    Collected,
    batch_responses,
    collect,
    num_scoring_responses,
    score_if_due,
)
from megatron_mmr1.trainers.reporting import Recorder, export_model
from megatron_mmr1.trainers.setup import Parts, build_parts
from megatron_mmr1.trainers.trust import stop_if_untrustworthy
from megatron_mmr1.types import ScoredGroup, StepBatch


def train(config: GrpoConfig, run_dir: Path, engine: RolloutEngine | None = None) -> None:
    """Train to `config.num_steps`, from the newest complete checkpoint
    when `config.resume` is auto.

    Leaves in the run folder what the README lists, and in `hf/` the last weights as a Hugging
    Face folder.

    Args:
        engine: of an earlier run of the same model and settings, to use again; None = a new one.
    """
    with build_parts(config, run_dir, engine) as parts:
        with parts.turns.training():
            start, best, num_responses = _resume(config, parts)
        parts.sync.push(version=start)
        records = Recorder(run_dir, start)
        with Progress(config.num_steps, start, "GRPO", is_quiet=not parallel.is_main()) as progress:
            if start == 0 and config.replay is None:
                records.write_metrics(0, _evaluate(config, parts) | parts.timers.pop())
            step, is_last = start, _is_over(start, num_responses, config, parts)
            while not is_last:
                step += 1
                is_best = False
                with parts.timers.phase("step"):
                    collected, metrics = one_step(step, num_responses, config, parts)
                    num_responses = int(metrics["rollout/responses_total"])
                    is_last = _is_over(step, num_responses, config, parts)
                    records.write_groups(step, collected, parts.train_set)
                    records.write_sampler(parts.sampler)
                    if config.replay is None and _is_due(step, config.evaluation.every, is_last):
                        metrics |= _evaluate(config, parts)
                        is_best = metrics["eval/accuracy_sampled"] > best
                        best = max(best, metrics["eval/accuracy_sampled"])
                metrics |= parts.timers.pop()
                records.write_metrics(step, metrics)
                progress.update(step, metrics)
                # Last, so that a resume finds the records of every step up to its checkpoint. Its
                # time is in the next step's line.
                if is_best or _is_due(step, config.checkpoint.every, is_last):
                    state = {
                        "best": best,
                        "num_responses": num_responses,
                        "sampler": parts.sampler.state_dict(),
                    }
                    with parts.turns.training(), parts.timers.phase("checkpoint"):
                        parts.checkpoints.save(step, parts.policy, state, is_best)
                    if not is_last:
                        with parts.timers.phase("weight_sync"):
                            parts.sync.wake()
        records.close()
        export_model(run_dir, parts.policy, config.model.path)


def _is_over(step: int, num_responses: int, config: GrpoConfig, parts: Parts) -> bool:
    """Whether `step` was the last one: no other is wanted, or the budget has none left."""
    if step == config.num_steps or config.max_responses == 0:
        return step == config.num_steps
    needed = num_scoring_responses(step + 1, config, parts) + batch_responses(config)
    is_over = config.max_responses < num_responses + needed
    if is_over and step == 0:
        raise ValueError(
            f"max_responses={config.max_responses} has no room for one step, which takes {needed} "
            "responses; raise it, or lower prompts_per_step, rollout.group_size or "
            "sampler.scoring_rollouts"
        )
    return is_over


def one_step(
    step: int, num_responses: int, config: GrpoConfig, parts: Parts
) -> tuple[Collected, dict[str, float]]:
    """Draw, sample, judge, learn, push the weights,
    and tell the sampler what its prompts were worth.

    Args:
        num_responses: generated before this step.

    Returns:
        What was generated, and the step's metrics without `parts.timers`.
    """
    timers, sampling = parts.timers, _training_sampling(config, step)
    num_scoring = score_if_due(step, config, parts, sampling)
    collected = collect(config, parts, sampling, num_responses + num_scoring)
    with parts.turns.training(), timers.phase("train"):
        metrics = _learn(collected.groups, config, parts)
    with timers.phase("weight_sync"):
        parts.sync.push(version=step)
    with timers.phase("sampler"):
        parts.sampler.observe(step, collected.stats)
    sums = group_sums([*collected.groups, *collected.discarded])
    metrics |= group_metrics(sums, timers.seconds("rollout")) | collected.metrics()
    metrics["rollout/scoring_responses"] = float(num_scoring)
    metrics["rollout/responses_total"] = num_responses + num_scoring + metrics["rollout/responses"]
    return collected, metrics | parts.sampler.metrics()


def _learn(groups: Sequence[ScoredGroup], config: GrpoConfig, parts: Parts) -> dict[str, float]:
    """Take the optimizer steps of one batch of rollouts;
    old and reference log-probs are frozen before the first.
    """
    num_steps = config.algorithm.optimizer_steps_per_batch
    loss = losses.grpo(config.algorithm)
    built = [_build(part, parts) for part in batched(groups, len(groups) // num_steps)]
    frozen = [_with_frozen_logprobs(step, config, parts) for step, _ in built]
    metrics = losses.mean_of_steps(
        [
            parts.policy.train_step(step, loss, parts.rule) | plan.metrics()
            for step, (_, plan) in zip(frozen, built, strict=True)
        ]
    )
    stop_if_untrustworthy(metrics, config.rollout.max_logprob_diff)
    return metrics | parts.policy.clock.pop()


def _build(groups: Sequence[ScoredGroup], parts: Parts) -> tuple[StepBatch, StepPlan]:
    """Build this rank's share of an optimizer step; pixels come from the data set."""
    samples = batching.samples_of_groups(groups)

    def sample(index: int) -> batching.Sample:
        prompt_id = samples[index].prompt.prompt_id
        prompt = parts.train_set[parts.train_set.index_of(prompt_id)]
        return replace(samples[index], prompt=prompt)

    return parts.builder.build([batching.size_of(s) for s in samples], sample)


def _with_frozen_logprobs(step: StepBatch, config: GrpoConfig, parts: Parts) -> StepBatch:
    if config.algorithm.optimizer_steps_per_batch > 1:
        step = batching.with_logprobs(step, old=parts.policy.logprobs(step, parts.rule))
    if config.algorithm.kl_coefficient > 0:
        step = batching.with_logprobs(step, ref=parts.policy.reference_logprobs(step, parts.rule))
    return step


def _evaluate(config: GrpoConfig, parts: Parts) -> dict[str, float]:
    """Measure held-out accuracy, sampled at the training temperature and greedy;
    the same seeds each time.
    """
    with parts.timers.phase("evaluation"):
        sampled = replace(
            _training_sampling(config, step=0), group_size=config.evaluation.samples_per_prompt
        )
        greedy = replace(sampled, group_size=1, temperature=0.0)
        metrics: dict[str, float] = {}
        for name, sampling in (("sampled", sampled), ("greedy", greedy)):
            groups = accuracy.generate_and_judge(
                parts.engine, parts.verifier, parts.heldout, sampling
            )
            mine = accuracy.judged(groups) if parts.place.is_leader else []
            everyone = parallel.gather_over_world(mine)
            metrics |= accuracy.accuracy(everyone, f"eval/accuracy_{name}")
    return metrics


def _training_sampling(config: GrpoConfig, step: int) -> Sampling:
    rollout = config.rollout
    return Sampling(
        rollout.group_size,
        rollout.temperature,
        rollout.max_response_tokens,
        config.seed,
        step,
        ignores_end=rollout.ignore_end,
    )


def _is_due(step: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and step % every == 0)


def _resume(config: GrpoConfig, parts: Parts) -> tuple[int, float, int]:
    """Return the step to go on from, the best held-out accuracy and the responses so far."""
    step = parts.checkpoints.newest() if config.resume == "auto" else None
    if step is None:
        return 0, float("-inf"), 0
    state = parts.checkpoints.load(step, parts.policy)
    if (notice := parts.sampler.load_state_dict(state["sampler"])) and parallel.is_main():
        print(f"resume: {notice}")
    return step, state["best"], state["num_responses"]
