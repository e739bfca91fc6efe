"""Expert parallelism of the tiny Qwen3-MoE: what test_experts.py checks on four processes,
`torchrun ... expert_cases.py FOLDER [CASE ...]`.

Against Hugging Face: `make parity`. Here layouts on more processes are held against one, which
writes its outcome first (`one_process`). How cases run and report: launched.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mmr1 import device

device.prepare_process()

import torch
from helpers import NO_CLIPPING, relative_difference
from launched import run_cases
from safetensors.torch import load_file
from torch import Tensor

from megatron_mmr1.backend import losses, parallel
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity import ours
from megatron_mmr1.parity.bounds import GRADIENT_BOUND, LOGPROB_BOUND, LOSS_BOUND
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.outcome import Difference, Outcome, difference

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
MAX_TOKENS = 64
SP = {"tp_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "TP2 + SP, DP2": SP,
    "EP2, DP4": {"ep_size": 2},
    "EP4, DP4": {"ep_size": 4},
    "EP2 x TP2 + SP, DP2": {**SP, "ep_size": 2},
    "EP4 x TP2 + SP, DP2": {**SP, "ep_size": 4},
    "EP2 x PP2, DP2": {"pp_size": 2, "ep_size": 2},
    "EP2 x PP2 x VPP2, DP2": {"pp_size": 2, "vpp_size": 2, "ep_size": 2},
    "EP2 x CP2, DP2": {"cp_size": 2, "ep_size": 2},
    "EP2 x TP2 x CP2 + SP": {**SP, "cp_size": 2, "ep_size": 2},
}
KIND = "text"


def make_policy(layout: ParallelConfig, lr: float = 0.0) -> MegatronPolicy:
    optimizer = OptimizerConfig(
        lr=lr, weight_decay=0.0, schedule="linear", max_grad_norm=NO_CLIPPING
    )
    return MegatronPolicy(ModelConfig(str(FOLDER / "model")), layout, optimizer, num_steps=10)


def one_process(folder: Path) -> Outcome:
    """What the others are held against; old and reference log-probs near the present ones, and so
    far from them that some ratios are clipped.
    """
    processor, layout = PromptProcessor(folder), ParallelConfig()
    trained = ours.build_policy(ModelConfig(str(folder)), layout)
    samples = make_samples(KIND, processor)
    packing = Packing.at(layout, MAX_TOKENS)
    step = ours.build_step(trained, samples, packing, processor)
    rule = SoftmaxRule(ours.TEMPERATURE, processor.banned_token_ids)
    now = ours.of_samples(step, trained.logprobs(step, rule))
    generator = torch.Generator().manual_seed(1)
    old, ref = (
        [now[i] + 0.3 * torch.randn(now[i].shape, generator=generator) for i in sorted(now)]
        for _ in range(2)
    )
    return ours.our_outcome(trained, samples, packing, processor, (old, ref))


def lay(name: str) -> ParallelConfig:
    layout = ParallelConfig(**LAYOUTS[name])
    parallel.lift_groups()
    parallel.lay_groups(layout, seed=0)
    return layout


def compare(name: str, change: Callable[[MegatronPolicy], None]) -> Compared:
    """Hold a layout against one process."""
    layout, processor = lay(name), PromptProcessor(FOLDER / "model")
    trained = ours.build_policy(ModelConfig(str(FOLDER / "model")), layout)
    change(trained)
    alone = Outcome.load(FOLDER / "one_process.safetensors")
    samples, packing = make_samples(KIND, processor), Packing.at(layout, MAX_TOKENS)
    found = ours.our_outcome(trained, samples, packing, processor, (alone.old, alone.ref))
    return Compared(
        difference(found, alone),
        difference(*(replace(o, gradients=of_experts(o.gradients)) for o in (found, alone))),
    )


@dataclass(frozen=True, slots=True)
class Compared:
    """How far a layout is from one process.

    Attributes:
        of_experts: with the experts' gradients alone.
    """

    of_all: Difference
    of_experts: Difference

    @property
    def is_good(self) -> bool:
        return (
            self.of_all.logprob <= LOGPROB_BOUND
            and self.of_all.loss <= LOSS_BOUND
            and self.of_all.gradient <= GRADIENT_BOUND
        )


def whole_tensors(trained: MegatronPolicy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trained.named_tensors()}


def of_experts(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gradients.items() if ".experts." in name}


def case_log_probs_and_gradients_are_those_of_one_process() -> None:
    """Plain sums everywhere: an expert's gradient is added up over the replicas of the expert, and
    nothing divides by the number of replicas or of expert-parallel ranks.
    """
    alone = of_experts(Outcome.load(FOLDER / "one_process.safetensors").gradients)
    assert sum(gradient.norm() > 0 for gradient in alone.values()) > len(alone) / 2
    compared = {name: compare(name, lambda trained: None) for name in LAYOUTS}
    wrong = {name: c for name, c in compared.items() if not c.is_good}
    assert not wrong, wrong


def case_exported_weights_are_the_model_file_bit_for_bit() -> None:
    """And each rank receives each byte of the model at most once."""
    in_file = load_file(FOLDER / "model" / "model.safetensors")
    model_bytes = sum(tensor.nbytes for tensor in in_file.values())
    for name in LAYOUTS:
        policy = make_policy(lay(name))
        named = {n: t.clone() for n, t in policy.named_tensors()}
        assert sorted(named) == sorted(in_file), name
        assert all(torch.equal(named[n], in_file[n]) for n in in_file), name
        # The vocabulary is padded for tensor parallelism.
        assert policy.num_bytes_received <= 1.02 * model_bytes, name


def case_ranks_exchange_unequal_numbers_of_tokens() -> None:
    """Else the first case would show less than it seems to."""
    layout, processor = lay("EP2, DP4"), PromptProcessor(FOLDER / "model")
    trained, samples = make_policy(layout), make_samples(KIND, processor)
    step = ours.build_step(trained, samples, Packing.at(layout, MAX_TOKENS), processor)
    lengths = [tuple(len(batch.token_ids_T) for batch in step.micro_batches)]
    assert len(set(parallel.gather_over_world(lengths))) > 1


def case_two_experts_in_each_others_place_would_be_noticed() -> None:
    """Negative control: on one of the expert-parallel ranks, in one layer."""

    @torch.no_grad()
    def swap(trained: MegatronPolicy) -> None:
        if parallel.ep_group().rank() == 0:
            first, second = trained.chunks[0].language.decoder.layers[0].mlp.experts.local_experts
            for a, b in zip(first.parameters(), second.parameters(), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    compared = compare("EP2, DP4", swap)
    assert compared.of_all.logprob > 100 * LOGPROB_BOUND
    assert compared.of_all.gradient > 100 * GRADIENT_BOUND


def case_a_mean_over_the_experts_replicas_would_be_noticed() -> None:
    """Negative control: what Megatron does where losses are means."""

    def average(trained: MegatronPolicy) -> None:
        for buffer in trained.model[0].expert_parallel_buffers:
            assert buffer.data_parallel_group.size() == 2
            for bucket in buffer.buckets:
                assert bucket.gradient_scaling_factor == 1
                bucket.gradient_scaling_factor = 1 / 2

    compared = compare("EP2, DP4", average)
    assert compared.of_all.logprob <= LOGPROB_BOUND
    assert abs(compared.of_experts.gradient - 1 / 2) <= GRADIENT_BOUND


def case_a_checkpoint_goes_on_at_any_other_layout() -> None:
    """Optimizer included: the weights are those saved, bit for bit, and the next losses and weights
    those of the run that was not moved.
    """
    processor = PromptProcessor(FOLDER / "model")
    loss = losses.supervised()

    def train(trained: MegatronPolicy, layout: ParallelConfig, seeds: range) -> list[float]:
        found = []
        for seed in seeds:
            samples = make_samples(KIND, processor, seed)
            step = ours.build_step(trained, samples, Packing.at(layout, MAX_TOKENS), processor)
            found.append(trained.train_step(step, loss, SoftmaxRule(1.0, ()))["loss"])
        return found

    if parallel.is_main():
        (FOLDER / "run").mkdir()
        (FOLDER / "run" / "config.yaml").write_text("run: test\n")
    parallel.barrier()
    checkpoints = Checkpoints(FOLDER / "run", keep_last=1)
    layout = lay("EP2, DP4")
    trained = make_policy(layout, lr=1e-3)
    train(trained, layout, range(2))
    checkpoints.save(2, trained, {"step": 2}, is_best=False)
    saved_weights = whole_tensors(trained)
    expected = train(trained, layout, range(2, 4))
    expected_weights = whole_tensors(trained)
    names = (
        "EP2, DP4", "DP4", "TP2 + SP, DP2", "EP4, DP4", "EP2 x PP2, DP2", "EP2 x TP2 + SP, DP2",
    )  # fmt: skip
    for name in names:
        layout = lay(name)
        trained = make_policy(layout, lr=1e-3)
        checkpoints.load(2, trained)
        for tensor_name, tensor in whole_tensors(trained).items():
            assert torch.equal(tensor, saved_weights[tensor_name]), (name, tensor_name)
        found = train(trained, layout, range(2, 4))
        for a, b in zip(found, expected, strict=True):
            assert abs(a - b) <= LOSS_BOUND, (name, found, expected)
        for tensor_name, tensor in whole_tensors(trained).items():
            # AdamW makes more of the rounding of a tiny gradient (see layout_cases.py).
            worst = relative_difference(tensor, expected_weights[tensor_name])
            assert worst <= 1e-4, (name, tensor_name, worst)
    # Negative control: forgotten moments of the experts alone are noticed.
    layout = lay("DP4")
    trained = make_policy(layout, lr=1e-3)
    checkpoints.load(2, trained)
    optimizer: Any = trained.optimizer
    _, of_experts_only = optimizer.chained_optimizers
    for state in of_experts_only.optimizer.state.values():
        state["exp_avg"].zero_()
    train(trained, layout, range(2, 4))
    found_weights = of_experts(whole_tensors(trained))
    worst = max(relative_difference(t, expected_weights[n]) for n, t in found_weights.items())
    assert worst > 1e-3


if __name__ == "__main__":
    run_cases(globals(), FOLDER, sys.argv[2:])
