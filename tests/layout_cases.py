"""What test_layouts.py checks on four processes: `torchrun ... layout_cases.py FOLDER [CASE ...]`.

How cases run and report: launched.py.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from megatron_mmr1 import device

device.prepare_process()

import torch
import torch.distributed as dist
from helpers import NO_CLIPPING, relative_difference
from launched import run_cases
from safetensors.torch import load_file
from torch import Tensor

from megatron_mmr1.backend import batching, losses, parallel, weights
from megatron_mmr1.backend.checkpoint import Checkpoints
from megatron_mmr1.backend.plan import Packing
from megatron_mmr1.backend.policy import MegatronPolicy
from megatron_mmr1.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_mmr1.data.processor import PromptProcessor
from megatron_mmr1.kernels.contract import SoftmaxRule
from megatron_mmr1.parity import ours
from megatron_mmr1.parity.cases import make_samples
from megatron_mmr1.parity.definition import definition_grpo
from megatron_mmr1.types import StepBatch

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
WHOLE_SOFTMAX = SoftmaxRule(1.0, ())
SP = {"tp_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "DP4": {},
    "TP2 + SP, DP2": SP,
    "PP2, DP2": {"pp_size": 2},
    "PP2 x VPP2, DP2": {"pp_size": 2, "vpp_size": 2},
    "CP2, DP2": {"cp_size": 2},
    "TP2 x PP2": {"tp_size": 2, "pp_size": 2},
    "TP2 x CP2 + SP": {**SP, "cp_size": 2},
    "TP4": {"tp_size": 4},
    "PP4": {"pp_size": 4},
}


def lay(name: str) -> ParallelConfig:
    layout = ParallelConfig(**LAYOUTS[name])  # type: ignore[arg-type]
    parallel.lift_groups()
    parallel.lay_groups(layout, seed=0)
    return layout


def make_policy(layout: ParallelConfig, model: str = "untied", dtype: str = "float32"):
    optimizer = OptimizerConfig(lr=1e-3, schedule="linear", max_grad_norm=NO_CLIPPING)
    return MegatronPolicy(
        ModelConfig(str(FOLDER / model)),
        layout,
        optimizer,
        num_steps=10,
        precision=PrecisionConfig(dtype),
    )


def make_step(policy: MegatronPolicy, layout: ParallelConfig, seed: int = 0) -> StepBatch:
    processor = PromptProcessor(FOLDER / "untied")
    samples = make_samples("mixed", processor, seed)
    return ours.build_step(policy, samples, Packing.at(layout, 64), processor)


def train(policy: MegatronPolicy, layout: ParallelConfig, steps: range) -> list[dict[str, float]]:
    loss = losses.supervised()
    return [
        policy.train_step(make_step(policy, layout, seed), loss, WHOLE_SOFTMAX) for seed in steps
    ]


def case_every_option_of_the_loss_equals_the_definition_at_any_layout() -> None:
    """One ratio a sequence, whose tokens lie on several context-parallel ranks; dual clip, capped
    trainer/rollout ratio, KL and entropy bonus. Bounds as in parity/bounds.py: float32 sums in
    another order.
    """
    config = AlgorithmConfig(
        ratio="sequence",
        dual_clip=1.3,
        tis_cap=1.1,
        kl_coefficient=0.1,
        entropy_coefficient=0.01,
        advantage_scale="none",
    )
    samples = make_samples("mixed", PromptProcessor(FOLDER / "untied"))

    def train(
        layout: ParallelConfig, loss: losses.LossFunction
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        policy = make_policy(layout)
        step = ours.build_step(
            policy, samples, Packing.at(layout, 64), PromptProcessor(FOLDER / "untied")
        )
        lengths = [len(sample.response_token_ids) for sample in samples]
        noise = torch.randn(2, sum(lengths), generator=torch.Generator().manual_seed(3)) / 3
        constants = [
            [s.rollout_logprobs + n for s, n in zip(samples, one.split(lengths), strict=True)]
            for one in noise
        ]
        old, ref = ([ours.of_rows(c, b) for b in step.micro_batches] for c in constants)
        rule = SoftmaxRule(0.7, (3, 17))
        metrics = policy.train_step(batching.with_logprobs(step, old, ref), loss, rule)
        return metrics, {name: tensor.clone() for name, tensor in policy.named_gradients()}

    expected, expected_gradients = train(lay("DP4"), definition_grpo(config))
    assert 0 < expected["tis_truncated_fraction"] < 1 and expected["clip_fraction"] > 0
    for name in LAYOUTS:
        metrics, gradients = train(lay(name), losses.grpo(config))
        for key, value in expected.items():
            if not key.startswith("packing"):
                assert math.isclose(metrics[key], value, rel_tol=1e-5, abs_tol=1e-5), (name, key)
        for key, gradient in expected_gradients.items():
            assert relative_difference(gradients[key], gradient) < 1e-5, (name, key)


def case_exported_weights_are_the_model_file_bit_for_bit() -> None:
    """At every layout, on every rank, and each rank receives each byte of the model at most once;
    what there is to move is exchanged once.
    """
    for model in ("untied", "tied"):
        in_file = load_file(FOLDER / model / "model.safetensors")
        model_bytes = sum(tensor.nbytes for tensor in in_file.values())
        for name in LAYOUTS:
            layout = lay(name)
            policy = make_policy(layout, model)
            exchanges: list[int] = []
            gather_object = dist.all_gather_object

            def count(
                *args: object,
                to: list[int] = exchanges,
                real: Callable = gather_object,
                **kw: object,
            ) -> None:
                to.append(1)
                real(*args, **kw)

            with (
                patch.object(dist, "all_gather_object", count),
                patch.object(weights, "BUCKET_BYTES", 100_000),
            ):
                for _ in range(2):
                    named = {n: t.clone() for n, t in policy.named_tensors()}
                    assert sorted(named) == sorted(in_file), name
                    for tensor_name, tensor in named.items():
                        assert torch.equal(tensor, in_file[tensor_name]), (name, tensor_name)
            assert len(exchanges) == 1, name
            received = policy.num_bytes_received
            # The vocabulary is padded for tensor parallelism.
            padding = 0.02 * model_bytes
            assert received <= model_bytes + padding, (name, received, model_bytes)
            if name in ("DP4", "CP2, DP2"):
                assert received == 0


def case_buckets_are_bounded() -> None:
    """No collective moves more than the bound, unless one parameter alone has more."""
    layout = lay("TP2 x PP2")
    policy = make_policy(layout)
    sizes: list[int] = []
    broadcast = dist.broadcast

    def measure(tensor: Tensor, *args: object, **kwargs: object) -> None:
        sizes.append(tensor.nbytes)
        broadcast(tensor, *args, **kwargs)

    mine = max(p.nbytes for chunk in policy.chunks for p in chunk.parameters())
    largest = max(parallel.gather_over_world([mine]))
    for bound in (20_000, 100_000, 10_000_000):
        sizes.clear()
        with (
            patch.object(dist, "broadcast", measure),
            patch.object(weights, "BUCKET_BYTES", bound),
        ):
            for _ in policy.named_tensors():
                pass
        assert max(sizes) <= max(bound, largest), bound
    assert len(sizes) == 2 * 2  # stages, and with it parameters that are cut and that are whole


def case_a_checkpoint_goes_on_at_any_other_layout() -> None:
    """Optimizer included: the weights are those saved, bit for bit, and the next losses and weights
    those of the run that was not moved.

    AdamW divides a gradient by its own size, so that the rounding of a tiny gradient comes back as
    large as the learning rate; weights are compared by each tensor's norm.
    """
    cases = [
        ("TP2 + SP, DP2", "float32", "untied", ["PP2, DP2", "CP2, DP2", "DP4", "TP4"]),
        ("PP2 x VPP2, DP2", "float32", "untied", ["TP2 x PP2", "PP4"]),
        ("PP2, DP2", "float32", "tied", ["TP2 + SP, DP2", "PP2 x VPP2, DP2", "DP4"]),
        ("DP4", "float32", "tied", ["TP2 x PP2", "TP2 x CP2 + SP"]),
        ("TP2 x PP2", "bfloat16", "untied", ["DP4", "CP2, DP2"]),
        ("TP4", "float32", "untied", ["DP4"]),  # from a padded vocabulary to one that isn't
    ]
    for number, (first, dtype, model, others) in enumerate(cases):
        run_dir = FOLDER / f"run_{number}"
        if parallel.is_main():
            run_dir.mkdir()
            (run_dir / "config.yaml").write_text("run: test\n")
        parallel.barrier()
        checkpoints = Checkpoints(run_dir, keep_last=2)
        layout = lay(first)
        policy = make_policy(layout, model, dtype)
        train(policy, layout, range(2))
        checkpoints.save(2, policy, {"step": 2}, is_best=False)
        saved_weights = {n: t.clone() for n, t in policy.named_tensors()}
        expected = train(policy, layout, range(2, 4))
        expected_weights = {n: t.clone() for n, t in policy.named_tensors()}
        exact = dtype == "float32"
        for name in [first, *others]:
            layout = lay(name)
            policy = make_policy(layout, model, dtype)
            assert checkpoints.load(2, policy) == {"step": 2}
            for tensor_name, tensor in policy.named_tensors():
                assert torch.equal(tensor, saved_weights[tensor_name]), (name, tensor_name)
            found = train(policy, layout, range(2, 4))
            for a, b in zip(found, expected, strict=True):
                assert a["lr"] == b["lr"]
                if name == first:
                    assert a == b, name
                # bfloat16 rounds elsewhere at another layout: 8 bits, of a loss of order 1.
                assert abs(a["loss"] - b["loss"]) <= (1e-5 if exact else 2e-2), (name, a, b)
            for tensor_name, tensor in policy.named_tensors() if exact else ():
                worst = relative_difference(tensor, expected_weights[tensor_name])
                assert worst <= 1e-4, (name, tensor_name, worst)
        # Negative control: forgotten moments are noticed.
        if number == 0:
            layout = lay("PP2, DP2")
            policy = make_policy(layout, model, dtype)
            checkpoints.load(2, policy)
            for part in policy.optimizer.chained_optimizers:
                for state in part.optimizer.state.values():
                    state["exp_avg"].zero_()
            forgotten = train(policy, layout, range(2, 4))
            assert abs(forgotten[1]["loss"] - expected[1]["loss"]) > 1e-4


def case_ranks_with_nothing_to_do_keep_the_others_company() -> None:
    """Fewer groups than ranks: empty micro-batches, the same loss, and no collective waits."""
    processor = PromptProcessor(FOLDER / "untied")
    samples = make_samples("mixed", processor)[:3]  # one group
    losses_found = []
    for name in ("DP4", "PP2, DP2", "CP2, DP2", "TP4"):
        layout = lay(name)
        policy = make_policy(layout)
        step = ours.build_step(policy, samples, Packing.at(layout, 64), processor)
        metrics = policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
        policy.logprobs(step, WHOLE_SOFTMAX)
        losses_found.append((metrics["loss"], metrics["grad_norm"]))
    for loss, norm in losses_found:
        assert abs(loss - losses_found[0][0]) <= 1e-6
        assert abs(norm / losses_found[0][1] - 1) <= 1e-5


def case_reference_logprobs_and_metrics_are_the_same_on_every_rank() -> None:
    for name in ("TP2 x PP2", "TP2 x CP2 + SP", "PP2 x VPP2, DP2"):
        layout = lay(name)
        policy = MegatronPolicy(
            ModelConfig(str(FOLDER / "untied")), layout, OptimizerConfig(lr=1e-2), 10,
            keep_reference=True,
        )  # fmt: skip
        step = make_step(policy, layout)
        start = torch.cat(policy.logprobs(step, WHOLE_SOFTMAX))
        metrics = policy.train_step(step, losses.supervised(), WHOLE_SOFTMAX)
        assert (torch.cat(policy.logprobs(step, WHOLE_SOFTMAX)) - start).abs().max() > 0.01
        assert torch.equal(torch.cat(policy.reference_logprobs(step, WHOLE_SOFTMAX)), start)
        everyone = parallel.gather_over_world([metrics])
        assert all(other == metrics for other in everyone)


def case_a_dropped_policy_takes_its_groups_threads_along() -> None:
    """Else a process that lays several layouts fills up with threads, and slows down."""

    def num_threads() -> int:
        parallel.lift_groups()
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    for name in ("DP4", "TP2 x PP2", "PP2 x VPP2, DP2"):
        layout = lay(name)
        policy = make_policy(layout)
        train(policy, layout, range(1))
        del policy
        # Threads of a library's own pools may come; those of 20 groups, three each, may not stay.
        assert num_threads() <= before + 10, name


if __name__ == "__main__":
    run_cases(globals(), FOLDER, sys.argv[2:])
