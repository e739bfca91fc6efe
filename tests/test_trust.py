"""A step that can't be trusted stops the run, with its reason."""

import math

import pytest

from megatron_mmr1.backend.losses import mean_of_steps
from megatron_mmr1.trainers.trust import stop_if_not_finite, stop_if_untrustworthy

GOOD = {
    "loss": 0.1,
    "grad_norm": 1.0,
    "tokens/response": 10.0,
    "tokens/nonfinite": 0.0,
    "tokens/compared": 10.0,
    "logprob_diff/sum": 1e-5,
}


def test_a_good_step_goes_on():
    metrics = mean_of_steps([GOOD, GOOD])
    assert metrics["tokens/uncompared"] == 0.0
    assert metrics["logprob_diff/mean"] == pytest.approx(1e-6)
    stop_if_untrustworthy(metrics, 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens/nonfinite": 2.0}, "2 response tokens have a log-prob that is not finite"),
        # Of the engine, or of a response that carries no loss: neither is in tokens/nonfinite.
        ({"tokens/compared": 7.0}, "3 response tokens have no finite log-prob"),
        ({"tokens/compared": 0.0, "logprob_diff/sum": 0.0}, "10 response tokens have no finite"),
        ({"logprob_diff/sum": 0.1}, "log-probs differ by 1.00e-02 on average"),
        ({"grad_norm": math.nan}, "grad_norm is nan: the run has diverged"),
        ({"loss": math.inf}, "loss is inf: the run has diverged"),
    ],
)
def test_a_bad_step_stops_the_run(changes: dict[str, float], message: str):
    with pytest.raises(RuntimeError, match=message):
        stop_if_untrustworthy(mean_of_steps([GOOD | changes]), 1e-4)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_cold_start_stops_too(name: str):
    stop_if_not_finite({"loss": 0.1, "grad_norm": 1.0})
    with pytest.raises(RuntimeError, match=f"{name} is nan"):
        stop_if_not_finite({"loss": 0.1, "grad_norm": 1.0, name: math.nan})
