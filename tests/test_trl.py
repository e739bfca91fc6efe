"""GRPO's loss and gradients against TRL 1.16's, by its own code (see trl_loss.py), in float64.

What differs by intent, and is kept out of the comparison:
- TRL divides by std + 1e-4 where we have 1e-6, so it is given our advantages.
- Our k3 and log-ratio are constant beyond +-20; inputs stay within. k3's series below 1/8 (here)
  and 1/2 (closed form) is the same function: it agrees where TRL's difference is precise.
- TRL counts a response without tokens in "grpo" and "dr_grpo"; we do not. There is none here.
- TRL's entropy bonus is the mean over tokens for every loss type; ours is aggregated like the
  loss. They meet in the token mean.
TRL's delta is our dual clip, and its vLLM correction's "token_truncate" our capped ratio.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import grpo_loss, loss_counts, token_weights
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import closed_form
from megatron_mmr1.kernels.contract import SUMS
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.types import ResponseRows

NUM_PROMPTS, GROUP_SIZE, FIXED_LENGTH = 4, 4, 48
LOSS_TYPES = {"token_mean": "bnpo", "sequence_mean": "grpo", "fixed_length": "dr_grpo"}
ALL = AlgorithmConfig(clip_low=0.15, clip_high=0.3, dual_clip=1.5, tis_cap=1.1, kl_coefficient=0.1)
CONFIGS = {
    "plain": AlgorithmConfig(),
    "clip_higher": AlgorithmConfig(clip_low=0.1, clip_high=0.28),
    "sequence_ratio": AlgorithmConfig(ratio="sequence", clip_low=0.03, clip_high=0.05),
    "dual_clip": AlgorithmConfig(dual_clip=1.5),
    "kl": AlgorithmConfig(kl_coefficient=0.1),
    "tis": AlgorithmConfig(tis_cap=1.1),
    "sequence_ratio_tis": AlgorithmConfig(ratio="sequence", clip_low=0.03, tis_cap=1.1),
    "entropy": AlgorithmConfig(entropy_coefficient=0.05),
    "sequence_mean": AlgorithmConfig(aggregation="sequence_mean"),
    "fixed_length": AlgorithmConfig(aggregation="fixed_length", advantage_scale="none"),
    "all_token_mean": replace(ALL, entropy_coefficient=0.05),
    "all_sequence_mean": replace(ALL, aggregation="sequence_mean"),
    "all_fixed_length_sequence_ratio": replace(
        ALL, ratio="sequence", aggregation="fixed_length", clip_high=0.02, dual_clip=1.03
    ),
}
# Token weights and rewards are float32 on our side: 2^-24 = 6e-8 relative in each token's share.
RTOL = 2e-7


class Responses:
    """Random packed responses [R] of unequal lengths, none empty; a NaN reward and equal rewards.

    Old, reference and engine log-probs are near enough for TRL's k3, and wide enough to clip.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        num = NUM_PROMPTS * GROUP_SIZE
        self.lengths_N = torch.randint(1, 40, (num,), generator=generator)
        self.mask_NL = torch.arange(int(self.lengths_N.max())) < self.lengths_N[:, None]
        self.rewards_N = torch.randint(0, 3, (num,), generator=generator) / 2
        self.rewards_N[:GROUP_SIZE] = 0.7
        num_rows = int(self.lengths_N.sum())

        def randn() -> Tensor:
            return torch.randn(num_rows, generator=generator, dtype=torch.float64)

        self.logprobs_R = randn() - 2
        self.old_R = self.logprobs_R + 0.3 * randn()
        self.ref_R = self.logprobs_R + torch.where(randn() > 0, 0.3 * randn(), 3 * randn())
        self.rollout_R = self.old_R + 0.2 * randn()
        self.entropy_R = randn().abs()

    def advantages_N(self, config: AlgorithmConfig) -> Tensor:
        rewards_PG = self.rewards_N.view(NUM_PROMPTS, GROUP_SIZE)
        return group_advantages(rewards_PG, config.advantage_scale).flatten()

    def weights_N(self, config: AlgorithmConfig) -> Tensor:
        kept_N = torch.ones_like(self.lengths_N, dtype=torch.bool)
        counts = loss_counts(self.lengths_N, kept_N)
        return token_weights(self.lengths_N, kept_N, config.aggregation, *counts, FIXED_LENGTH)

    def padded(self, values_R: Tensor) -> Tensor:
        """[N, L], 0 behind each response."""
        zeros_NL = values_R.new_zeros(self.mask_NL.shape)
        return zeros_NL.masked_scatter(self.mask_NL, values_R)


def _trl_case(responses: Responses, config: AlgorithmConfig) -> dict[str, Any]:
    settings = {
        "loss_type": LOSS_TYPES[config.aggregation],
        "importance_sampling_level": config.ratio,
        "epsilon_low": config.clip_low,
        "epsilon_high": config.clip_high,
        "delta": config.dual_clip or None,
        "beta": config.kl_coefficient,
        "entropy_coef": config.entropy_coefficient,
        "use_vllm": config.tis_cap > 0,
        "max_completion_length": FIXED_LENGTH,
    }
    tis_R = (responses.old_R - responses.rollout_R).exp().clamp(max=config.tis_cap)
    inputs = {
        "completion_mask": responses.mask_NL.double(),
        "advantages": responses.advantages_N(config).double(),
        "logprobs": responses.padded(responses.logprobs_R),
        "entropies": responses.padded(responses.entropy_R),
        "old_per_token_logps": responses.padded(responses.old_R),
        "ref_per_token_logps": responses.padded(responses.ref_R),
        "importance_sampling_ratio": responses.padded(tis_R),
    }
    return {"settings": settings, "inputs": inputs}


@pytest.fixture(scope="module")
def responses() -> Responses:
    return Responses()


@pytest.fixture(scope="module")
def trl_results(responses: Responses, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """TRL's results of every config, from one child process."""
    folder = tmp_path_factory.mktemp("trl")
    cases, results = folder / "cases.pt", folder / "results.pt"
    torch.save([_trl_case(responses, config) for config in CONFIGS.values()], cases)
    script = Path(__file__).with_name("trl_loss.py")
    with (folder / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, str(script), str(cases), str(results)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        )
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return dict(zip(CONFIGS, torch.load(results), strict=True))


def _definition(responses: Responses, config: AlgorithmConfig) -> dict[str, Tensor]:
    """The readable definition, with autograd's gradients."""
    sequence_R = torch.repeat_interleave(responses.lengths_N)
    logprobs_R = responses.logprobs_R.clone().requires_grad_()
    entropy_R = responses.entropy_R.clone().requires_grad_()
    found = grpo_loss(
        logprobs_R,
        responses.advantages_N(config).double()[sequence_R],
        responses.weights_N(config)[sequence_R],
        config,
        sequence=sequence_R,
        old_logprobs=responses.old_R,
        rollout_logprobs=responses.rollout_R,
        ref_logprobs=responses.ref_R,
        entropy=entropy_R,
    )
    d_logprobs_R, d_entropy_R = torch.autograd.grad(found.loss, (logprobs_R, entropy_R))
    sums = {name: getattr(found, name).detach() for name in SUMS}
    return sums | {"d_logprobs": d_logprobs_R, "d_entropies": d_entropy_R}


def _closed_form(responses: Responses, config: AlgorithmConfig) -> dict[str, Tensor]:
    """The kernels' torch form, which makes the advantages from the rewards itself."""
    num, ends = len(responses.lengths_N), responses.lengths_N.cumsum(0).tolist()
    sequences = pack_sequences(
        [0, *ends],
        ends[-1],
        sample=range(num),
        weight=responses.weights_N(config).tolist(),
        reward_index=range(num),
        group_offsets=range(0, num + 1, GROUP_SIZE),
        rewards_N=responses.rewards_N,
    )
    rows = ResponseRows(
        torch.zeros(ends[-1], dtype=torch.long),
        responses.rollout_R,
        sequences,
        responses.old_R,
        responses.ref_R,
    )
    found = closed_form.sequence_loss(responses.logprobs_R, responses.entropy_R, rows, config)
    d_entropy_R = found.d_entropy_R
    sums = dict(zip(SUMS, found.sums, strict=True))
    return sums | {
        "d_logprobs": found.d_logprobs_R,
        "d_entropies": torch.zeros_like(found.d_logprobs_R) if d_entropy_R is None else d_entropy_R,
    }


OURS = {"definition": _definition, "closed_form": _closed_form}


def _assert_same(ours: dict[str, Tensor], trls: dict[str, Any], responses: Responses) -> None:
    for name in ("d_logprobs", "d_entropies"):
        expected_R = trls[name][responses.mask_NL]
        assert (trls[name][~responses.mask_NL] == 0).all()
        torch.testing.assert_close(ours[name].double(), expected_R, rtol=RTOL, atol=0.0)
    # Positive and negative shares cancel in the sum: relative to their size, which is about 1.
    torch.testing.assert_close(ours["loss"].double(), trls["loss"], rtol=0.0, atol=RTOL)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", OURS)
def test_loss_and_gradients_are_those_of_trl(
    responses: Responses, trl_results: dict[str, Any], form: str, name: str
):
    _assert_same(OURS[form](responses, CONFIGS[name]), trl_results[name], responses)


@pytest.mark.parametrize("form", OURS)
def test_metrics_are_those_of_trl_in_the_token_mean(
    responses: Responses, trl_results: dict[str, Any], form: str
):
    """TRL's metrics are means over tokens; its clip fraction leaves the dual clip out."""
    kl, clip = (trl_results[name]["metrics"] for name in ("kl", "clip_higher"))
    ours = OURS[form](responses, CONFIGS["kl"])
    assert float(ours["kl"]) == pytest.approx(kl["kl"], rel=RTOL)
    assert float(ours["entropy"]) == pytest.approx(kl["entropy"], rel=RTOL)
    ours = OURS[form](responses, CONFIGS["clip_higher"])
    fraction = clip["clip_ratio/region_mean"]
    assert 0.05 < fraction < 0.95 and float(ours["clip_fraction"]) == pytest.approx(fraction)


# One option of each kind changed by little on our side.
CHANGES = {
    "clip_higher": {"clip_high": 0.29},
    "plain": {"clip_low": 0.21},
    "sequence_ratio": {"ratio": "token"},
    "dual_clip": {"dual_clip": 1.51},
    "kl": {"kl_coefficient": 0.1001},
    "tis": {"tis_cap": 1.101},
    "entropy": {"entropy_coefficient": 0.0501},
    "sequence_mean": {"aggregation": "token_mean"},
    "fixed_length": {"advantage_scale": "std"},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("form", OURS)
def test_a_changed_option_is_noticed(
    responses: Responses, trl_results: dict[str, Any], form: str, name: str
):
    """Negative control: each option takes effect in these inputs, and the tolerance sees it."""
    ours = OURS[form](responses, replace(CONFIGS[name], **CHANGES[name]))
    with pytest.raises(AssertionError):
        _assert_same(ours, trl_results[name], responses)
