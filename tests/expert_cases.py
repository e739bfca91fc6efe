"""A decoder with experts on our layers, attention and policy: what test_experts.py checks on four
processes, `torchrun ... expert_cases.py FOLDER [CASE ...]`, and what it computes in one.

How cases run and report: launched.py. `figures.json` keeps what was measured.

No model family has experts yet, so that no conversion table knows them: the weights are drawn from
the parameters' names in the whole model, and gradients are gathered here. Everything else is the
policy's.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_mmr1 import device

device.prepare_process()

import torch
from helpers import NO_CLIPPING, relative_difference
from launched import run_cases
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mmr1.backend import losses, parallel, policy, weights
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.model import transformer_config
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_mmr1.convert import required_hf_names
from megatron_mmr1.convert.qwen2_5_vl import RULES
from megatron_mmr1.convert.rules import gather, shard
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.data.tiny_model import TEXT_SIZES
from megatron_mmr1.parity import ours
from megatron_mmr1.parity.bounds import GRADIENT_BOUND, LOGPROB_BOUND, LOSS_BOUND
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.outcome import Difference, Outcome, difference

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
NUM_EXPERTS, EXPERT_SIZE, TOP_K = 4, 64, 2
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
BY_ALLGATHER = ("EP2, DP4", "EP2 x TP2 + SP, DP2", "EP2 x PP2, DP2", "EP2 x CP2, DP2")


class ExpertPolicy(policy.MegatronPolicy):
    """The policy, with experts in place of each layer's MLP.

    Attributes:
        metrics: of the last train step.
    """

    def __init__(
        self,
        folder: Path,
        layout: ParallelConfig,
        dispatcher: str = "alltoall",
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        def with_experts(hf_config: Any, model: Any, sizes: ParallelConfig) -> TransformerConfig:
            return replace(
                transformer_config(hf_config, model, replace(sizes, ep_size=1)),
                expert_model_parallel_size=sizes.ep_size,
                num_moe_experts=NUM_EXPERTS,
                moe_ffn_hidden_size=EXPERT_SIZE,
                moe_router_topk=TOP_K,
                moe_router_load_balancing_type="none",
                moe_token_dispatcher_type=dispatcher,
            )

        frozen = OptimizerConfig(lr=0.0, weight_decay=0.0, max_grad_norm=NO_CLIPPING)
        with (
            patch.object(policy, "transformer_config", with_experts),
            patch.object(weights.NamedWeights, "load", draw_weights),
        ):
            super().__init__(ModelConfig(str(folder)), layout, optimizer or frozen, num_steps=10)
        self.metrics: dict[str, float] = {}

    def train_step(self, *args: Any) -> dict[str, float]:
        self.metrics = super().train_step(*args)
        return self.metrics

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        # Gathers the distributed optimizer's shares; what it returns would ask the converter.
        super().named_gradients()
        yield from whole_tensors(self, lambda parameter: parameter.main_grad).items()


@torch.no_grad()
def draw_weights(mine: weights.NamedWeights, _: object) -> None:
    """Take this rank's part of whole tensors that depend on their names alone."""
    size, rank = parallel.tp_group().size(), parallel.tp_group().rank()
    for name, parameter in mine._mine.items():
        name, kind = expert_name(name), kind_of(name)
        parts = [torch.empty(parameter.shape, device="meta")] * size
        shape = gather(kind, parts, mine._vocab_size).shape
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator)
        if whole.ndim == 1:
            whole = 0.1 * whole + ("norm" in name)
        else:
            whole /= shape[1:].numel() ** 0.5
        parameter.copy_(shard(kind, whole, rank, size))


def expert_name(name: str) -> str:
    """Number an expert's parameter by its place among all experts."""
    num_local = NUM_EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    return re.sub(r"(?<=local_experts\.)\d+", lambda match: str(int(match.group()) + first), name)


def kind_of(name: str) -> Any:
    """How tensor parallelism cuts a parameter: an expert, and the router, not at all."""
    return "replicated" if ".mlp." in name else required_hf_names(RULES, name)[0].kind


def whole_tensors(trained: ExpertPolicy, value: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Gather something of every parameter from all ranks, by its name in the whole model.

    Raises:
        ValueError: ranks that hold the same part hold other values.
    """
    mine = [
        (expert_name(name), parallel.tp_group().rank(), value(parameter).detach().clone())
        for name, parameter in trained._weights._mine.items()
    ]
    parts: dict[str, dict[int, Tensor]] = {}
    for name, rank, tensor in parallel.gather_over_world(mine):
        place = 0 if kind_of(name) == "replicated" else rank
        first = parts.setdefault(name, {}).setdefault(place, tensor)
        # One copy may have been added up in another order than the other.
        if (first - tensor).norm() > GRADIENT_BOUND * first.norm():
            raise ValueError(f"the copies of {name} differ")
    vocab_size = trained.chunks[0].vocab_size
    return {
        name: gather(kind_of(name), [by_rank[i] for i in sorted(by_rank)], vocab_size)
        for name, by_rank in parts.items()
    }


def one_process(folder: Path) -> Outcome:
    """What the others are held against; old and reference log-probs near the present ones, and so
    far from them that some ratios are clipped.
    """
    processor, layout = PromptProcessor(folder), ParallelConfig()
    trained, samples = ExpertPolicy(folder, layout), make_samples("mixed", processor)
    step = ours.build_step(trained, samples, packing(layout), processor)
    rule = losses.SoftmaxRule(ours.TEMPERATURE, processor.banned_token_ids)
    now = ours.of_samples(step, trained.logprobs(step, rule))
    generator = torch.Generator().manual_seed(1)
    old, ref = (
        [now[i] + 0.3 * torch.randn(now[i].shape, generator=generator) for i in sorted(now)]
        for _ in range(2)
    )
    return ours.our_outcome(trained, samples, packing(layout), processor, (old, ref))


def packing(layout: ParallelConfig, dispatcher: str = "alltoall") -> Packing:
    """The layout's packing; the all-gather dispatcher wants as many tokens on every rank."""
    packed = Packing.at(layout, MAX_TOKENS)
    return packed if dispatcher == "alltoall" else replace(packed, total_multiple=MAX_TOKENS)


def lay(name: str) -> ParallelConfig:
    layout = ParallelConfig(**LAYOUTS[name])
    parallel.lift_groups()
    parallel.lay_groups(layout, seed=0)
    return layout


def compare(name: str, dispatcher: str, change: Callable[[ExpertPolicy], None]) -> Compared:
    """Hold a layout against one process."""
    layout, processor = lay(name), PromptProcessor(FOLDER / "model")
    trained = ExpertPolicy(FOLDER / "model", layout, dispatcher)
    change(trained)
    alone = Outcome.load(FOLDER / "one_process.safetensors")
    found = ours.our_outcome(
        trained,
        make_samples("mixed", processor),
        packing(layout, dispatcher),
        processor,
        (alone.old, alone.ref),
    )
    norm = sum(float(g.double().square().sum()) for g in alone.gradients.values()) ** 0.5
    return Compared(
        difference(found, alone),
        difference(*(replace(o, gradients=of_experts(o.gradients)) for o in (found, alone))),
        abs(trained.metrics["grad_norm"] / norm - 1),
    )


@dataclass(frozen=True, slots=True)
class Compared:
    """How far a layout is from one process.

    Attributes:
        of_experts: with the experts' gradients alone.
        grad_norm: relative difference of the norm over all gradients, which clipping uses.
    """

    of_all: Difference
    of_experts: Difference
    grad_norm: float

    @property
    def is_good(self) -> bool:
        return (
            self.of_all.logprob <= LOGPROB_BOUND
            and self.of_all.loss <= LOSS_BOUND
            and self.of_all.gradient <= GRADIENT_BOUND
            and self.grad_norm <= GRADIENT_BOUND
        )


def of_experts(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gradients.items() if ".experts." in name}


def case_log_probs_and_gradients_are_those_of_one_process() -> None:
    """Plain sums everywhere: an expert's gradient is added up over the replicas of the expert, and
    nothing divides by the number of replicas or of expert-parallel ranks.
    """
    alone = of_experts(Outcome.load(FOLDER / "one_process.safetensors").gradients)
    assert len(alone) == TEXT_SIZES["num_hidden_layers"] * NUM_EXPERTS * 2
    assert all(gradient.norm() > 0 for gradient in alone.values())
    figures, wrong = {}, []
    for dispatcher, names in (("alltoall", LAYOUTS), ("allgather", BY_ALLGATHER)):
        for name in names:
            compared = compare(name, dispatcher, lambda trained: None)
            figures[f"{name}, {dispatcher}"] = asdict(compared)
            wrong += [] if compared.is_good else [(name, dispatcher, compared)]
            if parallel.is_main():
                (FOLDER / "figures.json").write_text(json.dumps(figures, indent=1))
    assert not wrong, wrong


def case_ranks_exchange_unequal_numbers_of_tokens() -> None:
    """Else the first case would show less than it seems to."""
    layout, processor = lay("EP2, DP4"), PromptProcessor(FOLDER / "model")
    trained = ExpertPolicy(FOLDER / "model", layout)
    samples = make_samples("mixed", processor)
    step = ours.build_step(trained, samples, packing(layout), processor)
    lengths = [tuple(len(batch.token_ids_T) for batch in step.micro_batches)]
    assert len(set(parallel.gather_over_world(lengths))) > 1


def case_two_experts_in_each_others_place_would_be_noticed() -> None:
    """Negative control: on one of the expert-parallel ranks, in one layer."""

    @torch.no_grad()
    def swap(trained: ExpertPolicy) -> None:
        if parallel_state.get_expert_model_parallel_rank() == 0:
            first, second = trained.chunks[0].language.decoder.layers[0].mlp.experts.local_experts
            for a, b in zip(first.parameters(), second.parameters(), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)

    compared = compare("EP2, DP4", "alltoall", swap)
    assert compared.of_all.logprob > 100 * LOGPROB_BOUND
    assert compared.of_all.gradient > 100 * GRADIENT_BOUND


def case_a_mean_over_the_experts_replicas_would_be_noticed() -> None:
    """Negative control: what Megatron does where losses are means."""

    def average(trained: ExpertPolicy) -> None:
        for buffer in trained.model[0].expert_parallel_buffers:
            assert buffer.data_parallel_group.size() == 2
            for bucket in buffer.buckets:
                assert bucket.gradient_scaling_factor == 1
                bucket.gradient_scaling_factor = 1 / 2

    compared = compare("EP2, DP4", "alltoall", average)
    assert compared.of_all.logprob <= LOGPROB_BOUND
    assert abs(compared.of_experts.gradient - 1 / 2) <= GRADIENT_BOUND
    assert compared.grad_norm > 100 * GRADIENT_BOUND


def case_a_checkpoint_goes_on_at_any_other_layout() -> None:
    """Optimizer included: the weights are those saved, bit for bit, and the next losses and weights
    those of the run that was not moved.
    """
    moving = OptimizerConfig(lr=1e-3, schedule="linear", max_grad_norm=NO_CLIPPING)
    processor = PromptProcessor(FOLDER / "model")
    loss = losses.supervised(losses.SoftmaxRule(1.0, ()))

    def train(trained: ExpertPolicy, layout: ParallelConfig, seeds: range) -> list[float]:
        found = []
        for seed in seeds:
            samples = make_samples("mixed", processor, seed)
            step = ours.build_step(trained, samples, packing(layout), processor)
            found.append(trained.train_step(step, loss)["loss"])
        return found

    if parallel.is_main():
        (FOLDER / "run").mkdir()
        (FOLDER / "run" / "config.yaml").write_text("run: test\n")
    parallel.barrier()
    checkpoints = Checkpoints(FOLDER / "run", keep_last=1)
    layout = lay("EP2, DP4")
    trained = ExpertPolicy(FOLDER / "model", layout, optimizer=moving)
    train(trained, layout, range(2))
    checkpoints.save(2, trained, {"step": 2}, is_best=False)
    saved_weights = whole_tensors(trained, lambda parameter: parameter)
    expected = train(trained, layout, range(2, 4))
    expected_weights = whole_tensors(trained, lambda parameter: parameter)
    names = (
        "EP2, DP4", "DP4", "TP2 + SP, DP2", "EP4, DP4", "EP2 x PP2, DP2", "EP2 x TP2 + SP, DP2",
    )  # fmt: skip
    for name in names:
        layout = lay(name)
        trained = ExpertPolicy(FOLDER / "model", layout, optimizer=moving)
        checkpoints.load(2, trained)
        for tensor_name, tensor in whole_tensors(trained, lambda parameter: parameter).items():
            assert torch.equal(tensor, saved_weights[tensor_name]), (name, tensor_name)
        found = train(trained, layout, range(2, 4))
        for a, b in zip(found, expected, strict=True):
            assert abs(a - b) <= LOSS_BOUND, (name, found, expected)
        for tensor_name, tensor in whole_tensors(trained, lambda parameter: parameter).items():
            # AdamW makes more of the rounding of a tiny gradient (see layout_cases.py).
            worst = relative_difference(tensor, expected_weights[tensor_name])
            assert worst <= 1e-4, (name, tensor_name, worst)
    # Negative control: forgotten moments of the experts alone are noticed.
    layout = lay("DP4")
    trained = ExpertPolicy(FOLDER / "model", layout, optimizer=moving)
    checkpoints.load(2, trained)
    _, of_experts_only = trained.optimizer.chained_optimizers
    for state in of_experts_only.optimizer.state.values():
        state["exp_avg"].zero_()
    train(trained, layout, range(2, 4))
    found_weights = of_experts(whole_tensors(trained, lambda parameter: parameter))
    worst = max(relative_difference(t, expected_weights[n]) for n, t in found_weights.items())
    assert worst > 1e-3


if __name__ == "__main__":
    run_cases(globals(), FOLDER, sys.argv[2:])
