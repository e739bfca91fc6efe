"""Measure the memory of the output layer and GRPO's loss on a CPU, ours and the plain way.

Usage: python tools/measure_head_memory.py [--tokens 2048] [--vocab 151936] [--hidden 896] [--json]

Forward and backward in float32, gradients by hidden states and weight; each way in a process of
its own:
- ours: `OutputHead.grpo_loss`, chunk by chunk;
- plain: logits = hidden @ weight.T, log_softmax, gather, the definition's loss, autograd.
Memory is the largest growth of anonymous memory over what it is when weight, hidden states and rows
are there. Both hold the weight's gradient in the end; what is above it is the way's own. Freed
blocks go back to the system at once (glibc's heap would keep up to 80 MB of them, not always the
same), so the figure is memory in use.

The exit status is 1 when the gradients of the two differ or a gate does not hold: ours at most 1.5
times the weight's gradient, and the plain way's memory above that gradient at least 15 times ours.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from megatron_mmr1.algorithms.advantages import group_advantages
from megatron_mmr1.algorithms.grpo_loss import grpo_loss
from megatron_mmr1.config.schema import AlgorithmConfig
from megatron_mmr1.kernels.contract import SoftmaxRule, Vocabulary
from megatron_mmr1.kernels.head import OutputHead
from megatron_mmr1.kernels.sequences import pack_sequences
from megatron_mmr1.observability.memory import PeakMemory
from megatron_mmr1.types import ResponseRows

MOST_OF_GRADIENT, LEAST_SAVING = 1.5, 15.0
GROUP_SIZE = 8


def main() -> int:
    """Run both ways, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {GROUP_SIZE}")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--json", action="store_true", help="print a JSON object, not a table")
    parser.add_argument("--one", choices=_WAYS, help="measure one way in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args.one, args.tokens, args.vocab, args.hidden)))
        return 0
    result: dict[str, Any] = {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden}
    for way in _WAYS:
        result[way] = _run(way, args.tokens, args.vocab, args.hidden)
    result |= judge(result["ours"], result["plain"], 4 * args.vocab * args.hidden)
    if args.json:
        print(json.dumps(result))
    else:
        _print_table(result)
    return 0 if result["holds"] else 1


def judge(ours: dict[str, Any], plain: dict[str, Any], gradient_bytes: int) -> dict[str, Any]:
    """Compare two measurements with the gates."""
    of_gradient = ours["peak_bytes"] / gradient_bytes
    saving = (plain["peak_bytes"] - gradient_bytes) / (ours["peak_bytes"] - gradient_bytes)
    # Norms over as many numbers agree far better in float32; a wrong factor or row would show.
    is_same = all(math.isclose(ours[n], plain[n], rel_tol=1e-4) for n in _NORMS)
    return {
        "weight_gradient_bytes": gradient_bytes,
        "ours_of_weight_gradient": of_gradient,
        "saving": saving,
        "is_same": is_same,
        "holds": is_same and of_gradient <= MOST_OF_GRADIENT and saving >= LEAST_SAVING,
    }


def _print_table(result: dict[str, Any]) -> None:
    print(f"{result['tokens']} tokens, vocabulary {result['vocab']}, hidden {result['hidden']}\n")
    print(f"{'':30}{'peak MB':>10}{'seconds':>10}")
    print(f"{'weight gradient':30}{result['weight_gradient_bytes'] / 1e6:10.0f}")
    for way in _WAYS:
        one = result[way]
        print(f"{way:30}{one['peak_bytes'] / 1e6:10.0f}{one['seconds']:10.1f}")
    print(f"\nours / weight gradient: {result['ours_of_weight_gradient']:.2f}, "
          f"at most {MOST_OF_GRADIENT}")  # fmt: skip
    print(f"(plain - gradient) / (ours - gradient): {result['saving']:.1f}, "
          f"at least {LEAST_SAVING}")  # fmt: skip
    print("gradients agree" if result["is_same"] else "gradients DIFFER")
    print("holds" if result["holds"] else "does NOT hold")


def _run(way: str, tokens: int, vocab: int, hidden: int) -> dict[str, Any]:
    """Measure one way in a process of its own."""
    sizes = ["--tokens", str(tokens), "--vocab", str(vocab), "--hidden", str(hidden)]
    command = [sys.executable, __file__, "--one", way, *sizes]
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measure(way: str, tokens: int, vocab: int, hidden: int) -> dict[str, Any]:
    weight, hidden_RD, rows = _inputs(tokens, vocab, hidden)
    # What the first use of a function loads is not the way's own.
    _WAYS[way](*_inputs(GROUP_SIZE, 64, 16))
    with PeakMemory() as memory:
        start = time.monotonic()
        _WAYS[way](weight, hidden_RD, rows)
        seconds = time.monotonic() - start
    assert weight.grad is not None and hidden_RD.grad is not None
    norms = (float(weight.grad.norm()), float(hidden_RD.grad.norm()))
    return {
        "peak_bytes": memory.growth_bytes,
        "seconds": seconds,
        **dict(zip(_NORMS, norms, strict=True)),
    }


def _inputs(tokens: int, vocab: int, hidden: int) -> tuple[Tensor, Tensor, ResponseRows]:
    """A weight and hidden states that take gradients, and one group of equally long responses."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=generator).mul_(hidden**-0.5).requires_grad_()
    hidden_RD = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    sequences = pack_sequences(
        range(0, tokens + 1, tokens // GROUP_SIZE),
        tokens,
        sample=range(GROUP_SIZE),
        weight=[1 / tokens] * GROUP_SIZE,
        reward_index=range(GROUP_SIZE),
        group_offsets=[0, GROUP_SIZE],
        rewards_N=torch.arange(GROUP_SIZE).float() % 3,
    )
    target_ids_R = torch.randint(vocab, (tokens,), generator=generator)
    return weight, hidden_RD, ResponseRows(target_ids_R, torch.zeros(tokens), sequences)


def _ours(weight: Tensor, hidden_RD: Tensor, rows: ResponseRows) -> None:
    head = OutputHead(weight, Vocabulary(SoftmaxRule(1.0, ()), 0, len(weight)), "torch")
    loss, _ = head.grpo_loss(hidden_RD, rows, AlgorithmConfig())
    loss.backward()


def _plain(weight: Tensor, hidden_RD: Tensor, rows: ResponseRows) -> None:
    logits_RV = hidden_RD @ weight.t()
    all_logprobs_RV = logits_RV.log_softmax(-1)
    logprobs_R = all_logprobs_RV.gather(1, rows.target_ids_R.unsqueeze(1)).squeeze(1)
    sequences, sequence_R = rows.sequences, rows.sequence_R.long()
    advantages_N = group_advantages(sequences.rewards_N.view(1, GROUP_SIZE)).flatten()
    grpo_loss(
        logprobs_R,
        advantages_N[sequence_R],
        sequences.weight_S[sequence_R],
        AlgorithmConfig(),
        sequence=sequence_R,
    ).loss.backward()


_WAYS = {"ours": _ours, "plain": _plain}
_NORMS = ("weight_gradient_norm", "hidden_gradient_norm")

if __name__ == "__main__":
    sys.exit(main())
