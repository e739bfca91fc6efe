"""Measure packing and balance on lengths like MMR1's: waste, time, and the costliest rank.

Usage: python tools/measure_packing.py [--seed 0]

Simulated lengths, no model: 512 prompts of 8 responses. Prompts are lognormal with mean 763 tokens,
60% of them visual (4 patches each, one image). Responses are lognormal with mean 814, cut at 4,096;
half of the variance of their logarithm lies between prompts, because hard questions get long
answers to all their responses. Costs are those of a Qwen2.5-VL 7B (`StepCost`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import batched
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from megatron_mmr1.backend.cost import StepCost
from megatron_mmr1.backend.packing import (
    balance,
    first_fit_decreasing,
    longest_processing_time,
)

NUM_PROMPTS, GROUP_SIZE = 512, 8
PROMPT_MEAN, PROMPT_SIGMA = 763, 0.35
RESPONSE_MEAN, RESPONSE_SIGMA = 814, 0.6
MAX_TOKENS = 4096  # of a prompt, and of a response
VISUAL_SHARE, PATCHES_A_TOKEN = 0.6, 4
TEXT_7B = SimpleNamespace(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064,
)  # fmt: skip
VISION_7B = SimpleNamespace(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
    temporal_patch_size=2, spatial_merge_size=2, window_size=112, in_channels=3,
    fullatt_block_indexes=[7, 15, 23, 31], out_hidden_size=3584,
)  # fmt: skip


class Workload(NamedTuple):
    """One optimizer step's sequences, group by group. Tokens, and FLOPs."""

    lengths: list[int]
    costs: list[float]  # of a sequence without its image
    image_costs: list[float]  # of a prompt's image, once


Plan = list[list[int]]  # sequence indices of each rank


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    work = _workload(seed, trains_vision=True)
    text, image = sum(work.costs), sum(work.image_costs)
    print(
        f"{len(work.lengths)} sequences, mean {np.mean(work.lengths):.0f} tokens, longest "
        f"{max(work.lengths)}. Encoding each image once is {image / (text + image):.1%} of the "
        "step's FLOPs (trained tower).\n"
    )
    _print_packing(work.lengths)
    _print_independent(work)
    for trains_vision in (True, False):
        _print_groups(_workload(seed, trains_vision), trains_vision)


def _workload(seed: int, trains_vision: bool) -> Workload:
    rng = np.random.default_rng(seed)
    prompts = _lognormal(PROMPT_MEAN, PROMPT_SIGMA, rng.standard_normal(NUM_PROMPTS))
    shared = rng.standard_normal((NUM_PROMPTS, 1))
    own = rng.standard_normal((NUM_PROMPTS, GROUP_SIZE))
    responses = _lognormal(RESPONSE_MEAN, RESPONSE_SIGMA, (shared + own) / np.sqrt(2))
    lengths = (prompts[:, None] + responses).ravel().tolist()
    cost = StepCost.of(TEXT_7B, VISION_7B, trains_vision)
    return Workload(
        lengths,
        [cost.sequence(n, r) for n, r in zip(lengths, responses.ravel().tolist(), strict=True)],
        [cost.images([PATCHES_A_TOKEN * int(VISUAL_SHARE * p)]) for p in prompts.tolist()],
    )


def _lognormal(mean: float, sigma: float, normal: np.ndarray) -> np.ndarray:
    """Whole token counts with this mean before the cut; sigma of the logarithm."""
    tokens = mean * np.exp(sigma * normal - sigma**2 / 2)
    return np.clip(np.rint(tokens), 1, MAX_TOKENS).astype(int)


def _print_packing(lengths: list[int]) -> None:
    print("| micro-batches | capacity | number | wasted | best ms | median ms |")
    print("|---|---|---|---|---|---|")
    for capacity in (8192, 16384):
        for name, pack in (("first fit decreasing", first_fit_decreasing), ("next fit", _next_fit)):
            bins, times_ms = _timed(pack, lengths, capacity)
            wasted = 1 - sum(lengths) / (capacity * len(bins))
            print(
                f"| {name} | {capacity} | {len(bins)} | {wasted:.1%} "
                f"| {min(times_ms):.1f} | {statistics.median(times_ms):.1f} |"
            )
    rows = list(batched(lengths, 8))
    padded = sum(len(row) * max(row) for row in rows)
    wasted = 1 - sum(lengths) / padded
    print(f"| 8, padded to the longest | - | {len(rows)} | {wasted:.1%} | - | - |\n")


def _timed(
    pack: Callable[[Sequence[int], int], Plan], lengths: list[int], capacity: int
) -> tuple[Plan, list[float]]:
    bins: Plan = []
    times_ms = []
    for _ in range(20):
        start = time.perf_counter()
        bins = pack(lengths, capacity)
        times_ms.append(1e3 * (time.perf_counter() - start))
    return bins, times_ms


def _next_fit(lengths: Sequence[int], capacity: int) -> Plan:
    """In the order given; a bin is closed when the next sequence does not fit."""
    bins: Plan = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = capacity
        bins[-1].append(index)
        room -= length
    return bins


def _print_independent(work: Workload) -> None:
    print("| independent sequences, no images | DP | max / mean | ms |")
    print("|---|---|---|---|")
    for dp_size in (8, 64, 512):
        in_order = [list(range(rank, len(work.costs), dp_size)) for rank in range(dp_size)]
        for name, make in (
            ("every DP-th", lambda _costs, _size, plan=in_order: plan),
            ("LPT", longest_processing_time),
            ("LPT and exchanges", balance),
        ):
            start = time.perf_counter()
            plan = make(work.costs, dp_size)
            ms = 1e3 * (time.perf_counter() - start)
            loads = [sum(work.costs[i] for i in indices) for indices in plan]
            print(f"| {name} | {dp_size} | {max(loads) / np.mean(loads):.4f} | {ms:.1f} |")
    print()


def _print_groups(work: Workload, trains_vision: bool) -> None:
    tower = "trained" if trains_vision else "frozen"
    print(f"| groups of {GROUP_SIZE}, tower {tower} | DP | max / mean "
          "| max, whole groups = 1 | vision passes a group |")  # fmt: skip
    print("|---|---|---|---|---|")
    for dp_size in (8, 64):
        whole = _whole_groups(work, dp_size, balance)
        plans = {
            "every DP-th group": _members(range(r, NUM_PROMPTS, dp_size) for r in range(dp_size)),
            "whole groups, LPT": _whole_groups(work, dp_size, longest_processing_time),
            "whole groups, LPT and exchanges": whole,
            "sequences, LPT and exchanges": balance(work.costs, dp_size),
        }
        reference = max(_loads(work, whole))
        for name, plan in plans.items():
            loads = _loads(work, plan)
            print(f"| {name} | {dp_size} | {max(loads) / np.mean(loads):.4f} "
                  f"| {max(loads) / reference:.4f} | {_passes(plan):.2f} |")  # fmt: skip
    print()


def _whole_groups(
    work: Workload, dp_size: int, make: Callable[[Sequence[float], int], Plan]
) -> Plan:
    costs = [sum(one) for one in batched(work.costs, GROUP_SIZE)]
    costs = [text + image for text, image in zip(costs, work.image_costs, strict=True)]
    return _members(make(costs, dp_size))


def _members(groups_of_each_rank: Iterable[Iterable[int]]) -> Plan:
    return [
        [g * GROUP_SIZE + i for g in groups for i in range(GROUP_SIZE)]
        for groups in groups_of_each_rank
    ]


def _load(work: Workload, indices: Sequence[int]) -> float:
    groups = {i // GROUP_SIZE for i in indices}
    return sum(work.costs[i] for i in indices) + sum(work.image_costs[g] for g in groups)


def _loads(work: Workload, plan: Plan) -> list[float]:
    return [_load(work, indices) for indices in plan]


def _passes(plan: Plan) -> float:
    return sum(len({i // GROUP_SIZE for i in indices}) for indices in plan) / NUM_PROMPTS


if __name__ == "__main__":
    main()
