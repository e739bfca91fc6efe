"""When an optimizer step can't be trusted: the run stops before its weights go anywhere."""

from __future__ import annotations

import math


def stop_if_not_finite(metrics: dict[str, float]) -> None:
    """Stop after a step whose loss or gradient is NaN or infinite.

    Raises:
        RuntimeError: names the number and the remedy.
    """
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise RuntimeError(
                f"{name} is {metrics[name]}: the run has diverged; start again, or resume from a "
                "checkpoint, with a lower optimizer.lr"
            )


def stop_if_untrustworthy(metrics: dict[str, float], max_logprob_diff: float) -> None:
    """Stop a GRPO run whose trainer has diverged, or holds another model than its engine.

    Args:
        metrics: those of a batch's optimizer steps (`losses.mean_of_steps`).

    Raises:
        RuntimeError: says what was found and what to do.
    """
    if metrics["tokens/nonfinite"] > 0:
        raise RuntimeError(
            f"{metrics['tokens/nonfinite']:.0f} response tokens have a log-prob that is not "
            "finite: the run has diverged; resume from a checkpoint with a lower optimizer.lr"
        )
    if metrics["tokens/uncompared"] > 0:
        raise RuntimeError(
            f"{metrics['tokens/uncompared']:.0f} response tokens have no finite log-prob from the "
            "engine, or none from the trainer, so that the two can't be compared; look for the "
            "first such token in rollouts/, and resume from a checkpoint"
        )
    stop_if_not_finite(metrics)
    if not metrics["logprob_diff/mean"] <= max_logprob_diff:
        raise RuntimeError(
            "the trainer's and the engine's log-probs differ by "
            f"{metrics['logprob_diff/mean']:.2e} on average, above "
            f"rollout.max_logprob_diff={max_logprob_diff:g}: they don't hold "
            "the same model; raise the bound only if the precision explains it"
        )
