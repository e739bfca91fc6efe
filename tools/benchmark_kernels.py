"""Time GRPO's kernels on a GPU beside torch, torch.compile and Liger, against the speed of a copy.

Usage: python tools/benchmark_kernels.py [--out outputs/benchmark_kernels.json]

Not yet run on a GPU. The same routine runs at tiny sizes in Triton's interpreter, in
tests/test_benchmark.py.

T = 8,192 tokens (one group of 8 responses), V = 152,064 / TP columns, bfloat16, for TP 1, 2, 4, 8:
- copy: the logits once, read and written; everything else is a share of its bandwidth;
- log-probs: logits to log-probs (2 bytes a logit);
- gradient: logits to the loss's gradient by them (6 bytes a logit: two readings, one writing). Ours
  is one launch at TP 1; above, it is statistics, an all-gather in a group of one, and gradient. The
  others know no tensor parallelism: for them the shard is the vocabulary;
- sequence loss: log-probs to loss and gradient by them (20 bytes a token: launch-bound);
- head: hidden states to gradients by them and by the weight (three products of 2 T V D FLOPs).

A time is the median of 100 calls between CUDA events after 10 to warm up. Before each, inputs are
restored and 256 MiB are written, so that no input is in the L2 cache and launches are queued
before the GPU is free. Bytes are those that the task needs, whatever a way moves: "of copy" is
needed bytes / time / the copy's bandwidth. What a way computes is compared with torch in float32
first: a wrong one ends the command. Target: 90% of copy for our gradient.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import grpo_loss
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels import contract, triton_form
from megatron_mmr1.kernels.contract import Given, SoftmaxRule, TokenGrpo, Vocabulary
from megatron_mmr1.kernels.head import OutputHead
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.types import ResponseRows

CONFIG = AlgorithmConfig(clip_high=0.28)
GROUP_SIZE = 8
WARM_UP, REPEATS = 10, 100
FLUSH_BYTES = 256 << 20  # five times an H100's L2 cache
NUM_CHECKED = 64  # rows of logits; all of the other results are checked
TARGET = 0.9


class Sizes(NamedTuple):
    """T (a multiple of 8), V, D and the TP sizes that divide V."""

    tokens: int = 8192
    vocab: int = 152_064
    hidden: int = 3584
    tp_sizes: tuple[int, ...] = (1, 2, 4, 8)


class Case(NamedTuple):
    """Inputs at one TP size. `work` is what a way may overwrite; T tokens, V columns."""

    hidden_TD: Tensor
    weight_VD: Tensor
    logits_TV: Tensor
    work_TV: Tensor
    logprobs_T: Tensor
    rows: ResponseRows
    advantages_S: Tensor
    vocabulary: Vocabulary
    tp_size: int


class Task(NamedTuple):
    """What is computed, the bytes it needs to move and FLOPs, and how results are compared."""

    name: str
    num_bytes: int
    num_flops: int
    check: Callable[[Any], None]


Way = tuple[Callable[[], Any], Callable[[], Any]]  # restore the inputs (not timed); compute
Timer = Callable[[Callable[[], Any], Callable[[], Any]], float]  # of a way, in ms


def main() -> int:
    """Run at the full sizes; print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark_kernels.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmark_kernels needs a CUDA GPU, and torch sees none.", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    run(Sizes(), device, cuda_timer(device), args.out)
    return 0


def cuda_timer(device: torch.device) -> Timer:
    """The median between events, from a cold L2 cache."""
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_ms(restore: Callable[[], Any], compute: Callable[[], Any]) -> float:
        times = []
        for _ in range(WARM_UP + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            restore()
            flushed.zero_()
            start.record()
            compute()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[WARM_UP:])

    return time_ms


def run(sizes: Sizes, device: torch.device, timer: Timer, out: Path) -> None:
    """Check and time every way at every TP size."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    result = {"device": _device_name(device), "versions": _versions(), **sizes._asdict()}
    rows = []
    for tp_size in sizes.tp_sizes:
        rows += _measure(make_case(sizes, tp_size, device), timer)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result | {"rows": rows}, indent=1))
    print(f"{result['device']}, {result['versions']}, T = {sizes.tokens}, V = {sizes.vocab} / TP\n")
    print(table(rows))


def _measure(case: Case, timer: Timer) -> list[dict[str, Any]]:
    """One row of the table a way, the copy first."""
    num_bytes = 2 * case.logits_TV.numel() * case.logits_TV.element_size()
    copy_ms = timer(lambda: None, lambda: case.work_TV.copy_(case.logits_TV))
    rows = [_row(case, "copy", "", copy_ms, num_bytes, 0, num_bytes / copy_ms)]
    for task, ways in (
        logprobs_task(case),
        gradient_task(case),
        sequence_loss_task(case),
        head_task(case),
    ):
        for name, (restore, compute) in ways.items():
            restore()
            try:
                task.check(compute())
            except AssertionError as error:
                raise RuntimeError(f"{task.name}, {name}, TP {case.tp_size}: wrong") from error
            ms = timer(restore, compute)
            rows.append(
                _row(case, task.name, name, ms, task.num_bytes, task.num_flops, num_bytes / copy_ms)
            )
    return rows


def _row(
    case: Case, task: str, way: str, ms: float, num_bytes: int, num_flops: int, copy_speed: float
) -> dict[str, Any]:
    return {
        "tp_size": case.tp_size,
        "task": task,
        "way": way,
        "ms": ms,
        "num_bytes": num_bytes,
        "gb_per_s": num_bytes / ms / 1e6,
        "of_copy": num_bytes / ms / copy_speed if num_bytes else None,
        "tflop_per_s": num_flops / ms / 1e9 if num_flops else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, and whether our gradient reaches its target."""
    lines = ["| TP | task | way | ms | GB/s | of copy | TFLOP/s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        speed = f"{row['gb_per_s']:.0f} | {row['of_copy']:.0%}" if row["num_bytes"] else " | "
        flops = f"{row['tflop_per_s']:.0f}" if row["tflop_per_s"] else ""
        lines.append(
            f"| {row['tp_size']} | {row['task']} | {row['way']} | {row['ms']:.4f} | {speed} "
            f"| {flops} |"
        )
    lines.append("")
    for row in rows:
        if row["task"] == "gradient" and row["way"] == "ours":
            verdict = "reached" if row["of_copy"] >= TARGET else "NOT reached"
            lines.append(
                f"TP {row['tp_size']}: {row['of_copy']:.0%} of copy at 6 bytes a logit; target "
                f"{TARGET:.0%} {verdict}"
            )
    if not _has_liger():
        lines.append("Liger is not installed (liger-kernel): left out")
    return "\n".join(lines)


def make_case(sizes: Sizes, tp_size: int, device: torch.device, seed: int = 0) -> Case:
    """Random inputs: logits of deviation 2, old log-probs near the present ones."""
    generator = torch.Generator(device).manual_seed(seed)
    num_columns, length = sizes.vocab // tp_size, sizes.tokens // GROUP_SIZE

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden_TD = randn(sizes.tokens, sizes.hidden).bfloat16()
    weight_VD = (randn(num_columns, sizes.hidden) * 2 * sizes.hidden**-0.5).bfloat16()
    logits_TV = contract.padded_logits(sizes.tokens, num_columns, hidden_TD)
    torch.mm(hidden_TD, weight_VD.t(), out=logits_TV)
    targets_T = torch.randint(num_columns, (sizes.tokens,), generator=generator, device=device)
    logprobs_T = torch.cat([
        _logprobs_of(logits, targets)
        for logits, targets in zip(logits_TV.split(length), targets_T.split(length), strict=True)
    ])  # fmt: skip
    sequences = pack_sequences(
        range(0, sizes.tokens + 1, length),
        sizes.tokens,
        sample=range(GROUP_SIZE),
        weight=[1 / sizes.tokens] * GROUP_SIZE,
        reward_index=range(GROUP_SIZE),
        group_offsets=[0, GROUP_SIZE],
        rewards_N=torch.arange(GROUP_SIZE).float() % 3,
    )
    sequences = type(sequences)(*(getattr(sequences, n).to(device) for n in sequences.__slots__))
    old_T = logprobs_T + 0.2 * randn(sizes.tokens)
    return Case(
        hidden_TD=hidden_TD.requires_grad_(),
        weight_VD=weight_VD.requires_grad_(),
        logits_TV=logits_TV,
        work_TV=contract.padded_logits(sizes.tokens, num_columns, logits_TV),
        logprobs_T=logprobs_T,
        rows=ResponseRows(targets_T, old_T, sequences, old_T),
        advantages_S=group_advantages(sequences.rewards_N.unsqueeze(0)).squeeze(0),
        vocabulary=Vocabulary(
            SoftmaxRule(1.0, ()), 0, num_columns, None if tp_size == 1 else dist.group.WORLD
        ),
        tp_size=tp_size,
    )


def _logprobs_of(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The plain way to log-probs."""
    all_logprobs_TV = logits_TV.log_softmax(-1, dtype=torch.float32)
    return all_logprobs_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)


def _loss_of(
    logprobs_T: Tensor, advantages_T: Tensor, weights_T: Tensor, sequence_T: Tensor, old_T: Tensor
) -> Tensor:
    """The definition's loss."""
    return grpo_loss(
        logprobs_T,
        advantages_T,
        weights_T,
        CONFIG,
        sequence=sequence_T,
        old_logprobs=old_T,
        rollout_logprobs=old_T,
    ).loss


def _loss_of_logits(logits_TV: Tensor, targets_T: Tensor, *tokens: Tensor) -> Tensor:
    return _loss_of(_logprobs_of(logits_TV, targets_T), *tokens)


def _loss_of_hidden(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *tokens: Tensor
) -> Tensor:
    return _loss_of_logits(hidden_TD @ weight_VD.t(), targets_T, *tokens)


def _tokens(case: Case, part: slice = slice(None)) -> tuple[Tensor, ...]:
    """Constants of `_loss_of`, some tokens of them."""
    sequence_T = case.rows.sequence_R.long()[part]
    weights_T = case.rows.sequences.weight_S[sequence_T]
    old_T = case.rows.rollout_logprobs_R[part]
    return case.advantages_S[sequence_T], weights_T, sequence_T, old_T


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _gradients(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], *others: Tensor) -> Any:
    found = torch.autograd.grad(loss(*leaves, *others), leaves)
    return found if len(found) > 1 else found[0]


def _torch_ways(
    restore: Callable[[], Any],
    loss: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    *others: Tensor,
) -> dict[str, Way]:
    compiled = torch.compile(loss, dynamic=False)
    return {
        "torch": (restore, partial(_gradients, loss, leaves, *others)),
        "torch.compile": (restore, partial(_gradients, compiled, leaves, *others)),
    }


def logprobs_task(case: Case) -> tuple[Task, dict[str, Way]]:
    """Logits to log-probs; some rows are checked."""
    targets_T = case.rows.target_ids_R
    part = _checked(case)
    expected = _logprobs_of(case.logits_TV[part].float(), targets_T[part])

    def check(found: Any) -> None:
        torch.testing.assert_close(found[part], expected, rtol=0.0, atol=1e-4)  # float32 sums of V

    def restore() -> None:
        case.work_TV.copy_(case.logits_TV)

    ways: dict[str, Way] = {
        "ours": (
            restore,
            lambda: triton_form.logprobs_(case.work_TV, targets_T, case.vocabulary, False)[0],
        ),
        "torch": (restore, partial(_logprobs_of, case.work_TV, targets_T)),
        "torch.compile": (
            restore,
            partial(torch.compile(_logprobs_of, dynamic=False), case.work_TV, targets_T),
        ),
    }
    return Task("log-probs", 2 * case.logits_TV.numel(), 0, check), ways


def gradient_task(case: Case) -> tuple[Task, dict[str, Way]]:
    """Logits to the gradient of the loss by them; some rows are checked."""
    rows, targets_T = case.rows, case.rows.target_ids_R
    part = _checked(case)
    logits = _leaf(case.logits_TV[part].float())
    expected = _gradients(_loss_of_logits, (logits,), targets_T[part], *_tokens(case, part))
    d_logprobs_T = _gradients(_loss_of, (_leaf(case.logprobs_T),), *_tokens(case))

    def check(found: Tensor) -> None:
        # Each of them in bfloat16: half a unit in the last place is 2^-9, here four times that.
        if found.dim() == 3:  # Liger's has a position more in each response
            found = found[:, :-1].flatten(0, 1)
        torch.testing.assert_close(found[part].float(), expected, rtol=2**-7, atol=0.0)

    def restore() -> None:
        case.work_TV.copy_(case.logits_TV)

    def ours(upstream: Given | TokenGrpo) -> Tensor:
        triton_form.loss_gradient_(case.work_TV, targets_T, case.vocabulary, upstream)
        return case.work_TV

    ways: dict[str, Way] = {
        "ours": (restore, partial(ours, TokenGrpo(rows, rows.sequence_R, CONFIG))),
        "ours, log-probs' given": (restore, partial(ours, Given(d_logprobs_T))),
        **_torch_ways(restore, _loss_of_logits, (_leaf(case.work_TV),), targets_T, *_tokens(case)),
    }
    if _has_liger():
        ways["Liger"] = _liger_gradient(case)
    return Task("gradient", 6 * case.logits_TV.numel(), 0, check), ways


def sequence_loss_task(case: Case) -> tuple[Task, dict[str, Way]]:
    """Log-probs to the gradient of the loss by them."""
    logprobs_T = case.logprobs_T
    entropy_T = torch.ones_like(logprobs_T)
    expected = _gradients(_loss_of, (_leaf(logprobs_T),), *_tokens(case))

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)  # float32's exp

    def ours() -> Tensor:
        return triton_form.sequence_loss(logprobs_T, entropy_T, case.rows, CONFIG).d_logprobs_R

    ways = {"ours": (lambda: None, ours)}
    ways |= _torch_ways(lambda: None, _loss_of, (_leaf(logprobs_T),), *_tokens(case))
    return Task("sequence loss", 20 * len(logprobs_T), 0, check), ways


def head_task(case: Case) -> tuple[Task, dict[str, Way]]:
    """Hidden states to the gradients by them and by the weight."""
    hidden_TD, weight_VD, targets_T = case.hidden_TD, case.weight_VD, case.rows.target_ids_R
    leaves = _leaf(hidden_TD.float()), _leaf(weight_VD.float())
    expected = _gradients(_loss_of_hidden, leaves, targets_T, *_tokens(case))

    def check(found: tuple[Tensor, Tensor]) -> None:
        for ours, theirs in zip(found, expected, strict=True):
            # Logits up to 8 in bfloat16 are off by up to 2^-6, and so is each probability.
            assert (ours.float() - theirs).norm() <= 2**-5 * theirs.norm()

    def ours() -> Any:
        head = OutputHead(weight_VD, case.vocabulary, "triton")
        loss, _ = head.grpo_loss(hidden_TD, case.rows, CONFIG)
        return torch.autograd.grad(loss, (hidden_TD, weight_VD))

    ways: dict[str, Way] = {"ours": (lambda: None, ours)}
    ways |= _torch_ways(
        lambda: None, _loss_of_hidden, (hidden_TD, weight_VD), targets_T, *_tokens(case)
    )
    if _has_liger():
        ways["Liger"] = _liger_head(case)
    return Task("head", 0, 6 * case.logits_TV.numel() * hidden_TD.shape[1], check), ways


def _checked(case: Case) -> slice:
    return slice(None, None, max(1, len(case.logits_TV) // NUM_CHECKED))


def _liger_gradient(case: Case) -> Way:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    num_tokens, num_columns = case.logits_TV.shape
    shape = GROUP_SIZE, num_tokens // GROUP_SIZE
    work = _leaf(case.logits_TV.new_empty(shape[0], shape[1] + 1, num_columns))

    @torch.no_grad()
    def restore() -> None:
        work[:, :-1].copy_(case.logits_TV.view(*shape, num_columns))

    def loss(logits: Tensor) -> Tensor:
        return triton_grpo_loss(
            logits,
            case.rows.rollout_logprobs_R.view(shape),
            None,
            case.rows.target_ids_R.view(shape),
            case.advantages_S,
            temperature=1.0,
            beta=0.0,
            eps_low=CONFIG.clip_low,
            eps_high=CONFIG.clip_high,
            inplace=True,
            loss_type="bnpo",
            reduce=True,
        )[0]

    return restore, partial(_gradients, loss, (work,))


def _liger_head(case: Case) -> Way:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = GROUP_SIZE, len(case.logits_TV) // GROUP_SIZE
    fused = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CONFIG.clip_low,
        epsilon_high=CONFIG.clip_high,
        loss_type="bnpo",
    )

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return fused(
            hidden_TD.view(*shape, -1),
            weight_VD,
            case.rows.target_ids_R.view(shape),
            torch.ones(shape, device=hidden_TD.device),
            case.advantages_S,
            old_per_token_logps=case.rows.rollout_logprobs_R.view(shape),
        )[0]

    return lambda: None, partial(_gradients, loss, (case.hidden_TD, case.weight_VD))


def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str | None]:
    packages = ["torch", "triton", *(["liger-kernel"] if _has_liger() else [])]
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"cuda": torch.version.cuda}


if __name__ == "__main__":
    sys.exit(main())
