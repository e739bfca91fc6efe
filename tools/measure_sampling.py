"""Measure a step's sampling: 512 weights change, then 512 distinct prompts are drawn by weight.

Usage: python tools/measure_sampling.py [--large] [--seed 0]

Weights are uniform in (0, 1), and so are the new ones; no model. Side by side, each step on all:

- tree: `WeightTree.set` of 512 weights, then `draw` of 512 without replacement, the random numbers
  included.
- epoch: torch's WeightedRandomSampler made anew from a float32 tensor of the weights, which draws
  an epoch of P WITH replacement and hands it out as a list; its first 512 are the batch.
- released: the released MMR1 trainer's draw when weights have changed (LengSicong/MMR1 d8161a0,
  verl/curriculum/samplers.py): that epoch, then put in the order of a torch.randperm, element by
  element. Left out, to be on the safe side: its computing of the weights, and mixing in the uniform
  half. It draws on from the same epoch until the weights change again, so it pays this once a
  refresh; our scores may change every step.
- multinomial: the least that torch can do for the same draw as the tree's: one torch.multinomial of
  512 without replacement, on a float64 tensor in which the 512 weights are written in place.

torch.multinomial refuses more than 2**24 weights, so at 100M (--large: 0.9 GB for the tree, 2.9 GB
at the peak) the tree and the pass stand alone. The second table is uniform sampling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.sampling.weight_tree import WeightTree

NUM_CHANGED = NUM_DRAWN = 512
SIZES, LARGE = (15_000, 1_000_000), 100_000_000
MOST_OF_TORCH = 2**24
NUM_STEPS, NUM_OTHER_STEPS = 101, 5


class Change(NamedTuple):
    """What one step writes into the weights."""

    indices: np.ndarray
    values: np.ndarray


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--large", action="store_true", help="also 100M prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = (*SIZES, LARGE) if args.large else SIZES
    print(
        f"Median ms: {NUM_CHANGED} weights change, {NUM_DRAWN} prompts are drawn;"
        f" {torch.get_num_threads()} torch threads. Goals for the tree: at most 1 ms at 1M, 2 ms at"
        " 100M, and 1,000 times less than a sampler made anew at 1M. In brackets: times the tree.\n"
    )
    _print_by_weight(sizes, args.seed)
    _print_passes(sizes, args.seed)


def _print_by_weight(sizes: tuple[int, ...], seed: int) -> None:
    print("| prompts | tree: set | draw | both | multinomial | epoch | released "
          "| tree: build | bytes a prompt |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for num_prompts in sizes:
        rng = np.random.default_rng(seed)
        weights = rng.random(num_prompts)
        WeightTree(weights[:100]).draw(rng.random(1), with_replacement=False)  # compiles
        build_ms, tree = _median(lambda weights=weights: WeightTree(weights), num_prompts)
        set_ms, draw_ms = [], []
        others: dict[str, list[float]] = {"multinomial": [], "epoch": [], "released": []}
        for step in range(NUM_STEPS):
            change = Change(
                rng.choice(num_prompts, NUM_CHANGED, shuffle=False), rng.random(NUM_CHANGED)
            )
            set_ms.append(_timed(lambda tree=tree, change=change: tree.set(*change))[0])
            draw_ms.append(_timed(lambda tree=tree, rng=rng: _draw(tree, rng))[0])
            weights[change.indices] = change.values
            if step < NUM_OTHER_STEPS and num_prompts <= MOST_OF_TORCH:
                tensor = torch.from_numpy(weights)
                single = tensor.float()
                for name, work in (
                    ("multinomial", lambda t=tensor, c=change: _multinomial(t, c)),
                    ("epoch", lambda t=single: _epoch(t)[:NUM_DRAWN]),
                    ("released", lambda t=single: _released(t)[:NUM_DRAWN]),
                ):
                    others[name].append(_timed(work)[0])
        both_ms = statistics.median(map(sum, zip(set_ms, draw_ms, strict=True)))
        columns = [
            *(f"{statistics.median(ms):.3f}" for ms in (set_ms, draw_ms)),
            f"{both_ms:.3f}",
            *(_beside(both_ms, ms) for ms in others.values()),
            f"{build_ms:,.1f}",
            f"{tree.num_bytes / num_prompts:.2f}",
        ]
        print(f"| {num_prompts:,} | {' | '.join(columns)} |", flush=True)
    print()


def _draw(tree: WeightTree, rng: np.random.Generator) -> list[int]:
    return tree.draw(rng.random(NUM_DRAWN), with_replacement=False).tolist()


def _beside(tree_ms: float, other_ms: list[float]) -> str:
    if not other_ms:
        return "-"
    median_ms = statistics.median(other_ms)
    return f"{median_ms:,.1f} ({median_ms / tree_ms:,.0f}x)"


def _epoch(weights: torch.Tensor) -> list[int]:
    # torch annotates a sequence of floats; a tensor is what it makes of it
    sampler = WeightedRandomSampler(cast("Sequence[float]", weights), len(weights))
    return list(sampler)


def _released(weights: torch.Tensor) -> list[int]:
    epoch = _epoch(weights)
    return [epoch[place] for place in torch.randperm(len(epoch))]


def _multinomial(weights: torch.Tensor, change: Change) -> list[int]:
    weights[torch.from_numpy(change.indices)] = torch.from_numpy(change.values)
    return torch.multinomial(weights, NUM_DRAWN, replacement=False).tolist()


def _print_passes(sizes: tuple[int, ...], seed: int) -> None:
    print(f"| prompts | a pass's {NUM_DRAWN} next prompts | beginning a pass | its share of a draw "
          "| bytes a prompt |")  # fmt: skip
    print("|---|---|---|---|---|")
    for num_prompts in sizes:
        begin_ms, passes = _median(lambda num=num_prompts: UniformPasses(num, seed), num_prompts)
        take_ms = [_timed(lambda passes=passes: passes.take(NUM_DRAWN))[0] for _ in range(29)]
        share_ms = begin_ms * NUM_DRAWN / num_prompts
        num_bytes = passes._order.nbytes / num_prompts
        print(
            f"| {num_prompts:,} | {statistics.median(take_ms):.3f} | {begin_ms:,.1f}"
            f" | {share_ms:.3f} | {num_bytes:.2f} |",
            flush=True,
        )


def _median[Result](work: Callable[[], Result], num_prompts: int) -> tuple[float, Result]:
    """Of what takes seconds at 100M: there one time is all."""
    timed = [_timed(work) for _ in range(1 if num_prompts == LARGE else 5)]
    times_ms, results = zip(*timed, strict=True)
    return statistics.median(times_ms), results[-1]


def _timed[Result](work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = work()
    return 1e3 * (time.perf_counter() - start), result


if __name__ == "__main__":
    main()
