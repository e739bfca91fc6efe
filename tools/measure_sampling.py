"""Measure a step's sampling: 512 weights change, then 512 distinct prompts are drawn by weight.

Usage: python tools/measure_sampling.py [--large] [--seed 0]

Weights are uniform in (0, 1), and so are the new ones; no model. Side by side, each step on all:

- tree: `WeightTree.set` of 512 weights, then `draw` of 512 without replacement, the random numbers
  included.
- rebuilt: what the released MMR1 trainer effectively does when weights have changed: they become a
  list and a new torch WeightedRandomSampler, which draws an epoch of P WITH replacement and hands
  it out as a list, of which the first 512 are the batch. Computing the weights is not timed.
- multinomial: the least that torch can do for the same draw as the tree's: one torch.multinomial of
  512 without replacement, on a float64 tensor in which the 512 weights are written in place.

torch.multinomial refuses more than 2**24 weights, so at 100M (--large: 0.9 GB for the tree, 2.1 GB
at the peak) the tree and the pass stand alone. The second table is uniform sampling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import WeightedRandomSampler

from megatron_mmr1.sampling.passes import UniformPasses
from megatron_mmr1.sampling.weight_tree import WeightTree

NUM_CHANGED = NUM_DRAWN = 512
SIZES, LARGE = (15_000, 1_000_000), 100_000_000
MOST_OF_TORCH = 2**24
NUM_STEPS, MIN_TREE_STEPS = 7, 101


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
        f"Median ms of {NUM_CHANGED} changed weights and {NUM_DRAWN} prompts drawn;"
        f" {torch.get_num_threads()} torch threads. Goals for the tree: at most 1 ms at 1M, 2 ms at"
        " 100M, and 1,000 times the rebuilt sampler at 1M.\n"
    )
    _print_by_weight(sizes, args.seed)
    _print_passes(sizes, args.seed)


def _print_by_weight(sizes: tuple[int, ...], seed: int) -> None:
    print("| prompts | tree: set | draw | both | rebuilt | multinomial | rebuilt / tree "
          "| multinomial / tree | tree: build | bytes a prompt |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|")
    for num_prompts in sizes:
        rng = np.random.default_rng(seed)
        weights = rng.random(num_prompts)
        WeightTree(weights[:100]).draw(rng.random(1), with_replacement=False)  # compiles
        build_ms, tree = _timed(lambda weights=weights: WeightTree(weights))
        set_ms, draw_ms, rebuilt_ms, multinomial_ms = [], [], [], []
        for step in range(MIN_TREE_STEPS):
            change = Change(
                rng.choice(num_prompts, NUM_CHANGED, shuffle=False), rng.random(NUM_CHANGED)
            )
            set_ms.append(_timed(lambda tree=tree, change=change: tree.set(*change))[0])
            draw_ms.append(_timed(lambda tree=tree, rng=rng: _draw(tree, rng))[0])
            weights[change.indices] = change.values
            if step < NUM_STEPS and num_prompts <= MOST_OF_TORCH:
                rebuilt_ms.append(_timed(lambda weights=weights: _rebuild(weights))[0])
                tensor = torch.from_numpy(weights)
                multinomial_ms.append(_timed(lambda t=tensor, c=change: _multinomial(t, c))[0])
        both_ms = statistics.median(map(sum, zip(set_ms, draw_ms, strict=True)))
        torch_ms = [statistics.median(ms) for ms in (rebuilt_ms, multinomial_ms) if ms]
        columns = [
            *(f"{statistics.median(ms):.3f}" for ms in (set_ms, draw_ms)),
            f"{both_ms:.3f}",
            *([f"{ms:,.1f}" for ms in torch_ms] or ["-", "-"]),
            *([f"{ms / both_ms:,.0f}" for ms in torch_ms] or ["-", "-"]),
            f"{build_ms:,.1f}",
            f"{tree.num_bytes / num_prompts:.2f}",
        ]
        print(f"| {num_prompts:,} | {' | '.join(columns)} |", flush=True)
    print()


def _draw(tree: WeightTree, rng: np.random.Generator) -> list[int]:
    return tree.draw(rng.random(NUM_DRAWN), with_replacement=False).tolist()


def _rebuild(weights: np.ndarray) -> list[int]:
    epoch = list(WeightedRandomSampler(weights.tolist(), len(weights), replacement=True))
    return epoch[:NUM_DRAWN]


def _multinomial(weights: torch.Tensor, change: Change) -> list[int]:
    weights[torch.from_numpy(change.indices)] = torch.from_numpy(change.values)
    return torch.multinomial(weights, NUM_DRAWN, replacement=False).tolist()


def _print_passes(sizes: tuple[int, ...], seed: int) -> None:
    print(f"| prompts | a pass's {NUM_DRAWN} next prompts | beginning a pass | its share of a draw "
          "| bytes a prompt |")  # fmt: skip
    print("|---|---|---|---|---|")
    for num_prompts in sizes:
        begin_ms, passes = _timed(lambda num=num_prompts: UniformPasses(num, seed))
        take_ms = [_timed(lambda passes=passes: passes.take(NUM_DRAWN))[0] for _ in range(29)]
        share_ms = begin_ms * NUM_DRAWN / num_prompts
        num_bytes = passes._order.nbytes / num_prompts
        print(
            f"| {num_prompts:,} | {statistics.median(take_ms):.3f} | {begin_ms:,.1f}"
            f" | {share_ms:.3f} | {num_bytes:.2f} |",
            flush=True,
        )


def _timed[Result](work: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = work()
    return 1e3 * (time.perf_counter() - start), result


if __name__ == "__main__":
    main()
