"""Which sequences share a micro-batch, and which rank trains them.

Owns the two assignments. Does not build tensors (batching.py), knows no process group, and imports
neither torch nor megatron: every rank computes the whole plan from the same integers, so the
functions are deterministic and no rank has to be told.

The two assignments want different weights. Memory grows with tokens, so micro-batches are filled
by length; time grows with FLOPs, so ranks are balanced by what cost.py counts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

# Bounds on the exchanges of `balance`: how many, with how many of the least loaded ranks, and how
# much of the costliest load one must save.
_EXCHANGES_A_RANK, _TAKERS, _LEAST_GAIN = 8, 32, 1e-5


def pad_to(length: int, multiple: int) -> int:
    """Round `length` up to a multiple, both in tokens."""
    return -(-length // multiple) * multiple


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sequences into micro-batches: longest first, each into the first one with room.

    At most 11/9 of the fewest possible bins, plus one (Johnson, 1973). Sequences are short beside
    the capacity, so the last ones placed fill the holes and the bins come out nearly full. The
    price: a group is spread over bins, and each bin that holds part of it encodes its images.

    A tree over the bins holds in every node the largest room below it; the first bin with room is
    one walk down from the root: O(n log n). Bins that are not open yet are leaves with all their
    room, so that opening one is no special case.

    Args:
        lengths: tokens of each sequence, as it will lie in the micro-batch (padding included).
        capacity: tokens a bin holds.

    Returns:
        Indices into `lengths` for each bin, bins in order of opening, and in a bin longest first.
        Equal lengths go by index. Nothing for no sequences.

    Raises:
        ValueError: a sequence is longer than a bin.
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise ValueError(
            f"max_tokens_per_microbatch={capacity} holds no sequence of {longest} tokens (sequence "
            f"{list(lengths).index(longest)}); raise it to {longest} or more, or lower "
            "max_prompt_tokens or max_response_tokens"
        )
    num_leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [capacity] * (
        2 * num_leaves
    )  # node k has the children 2k and 2k + 1; node 1 is the root
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: ties by index
        length = lengths[index]
        node = 1
        while node < num_leaves:
            node *= 2
            node += room[node] < length
        if node - num_leaves == len(bins):
            bins.append([])
        bins[node - num_leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def longest_processing_time(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Balance work over ranks: the costliest item first, each to the least loaded rank.

    The costliest rank has at most 4/3 - 1/(3 num_ranks) of the smallest possible load (Graham,
    1969). An item is what must stay on one rank, such as a prompt with all its responses: kept
    together, their images are encoded once.

    Args:
        costs: of each item, in any one unit.
        num_ranks: data-parallel ranks.

    Returns:
        Indices into `costs` for each rank, ascending. Equal costs go by index, and to the lower of
        equally loaded ranks. A rank has none where items are fewer than ranks.
    """
    items: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # ascending, hence a heap
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = loads[0]
        items[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], rank))
    return [sorted(indices) for indices in items]


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Balance work over ranks: longest processing time, then exchanges.

    With few items a rank, LPT leaves the costliest one some per cent above the mean, which all
    others wait for. It then gives an item to one of the least loaded ranks, against one of theirs
    or none: the exchange that brings the two loads closest together, as long as that helps.

    Args, returns: as `longest_processing_time`, and never a costlier costliest rank.
    """
    items = longest_processing_time(costs, num_ranks)
    loads = np.array([sum(costs[i] for i in indices) for indices in items])
    for _ in range(_EXCHANGES_A_RANK * num_ranks):
        giver = int(loads.argmax())
        if not items[giver]:
            break  # there is nothing to do at all
        best: tuple[float, int, int, int] | None = None
        for taker in loads.argsort(kind="stable")[:_TAKERS].tolist():
            half = (loads[giver] - loads[taker]) / 2
            given = np.array([costs[i] for i in items[giver]])
            taken = np.array([0.0, *(costs[i] for i in items[taker])])
            missed = np.abs(given[:, None] - taken[None, :] - half)
            first, second = divmod(int(missed.argmin()), len(taken))
            after = (loads[giver] + loads[taker]) / 2 + missed[first, second]
            if best is None or after < best[0]:
                best = after, taker, first, second
        if best is None or not best[0] < loads[giver] * (1 - _LEAST_GAIN):
            break
        _, taker, first, second = best
        moved = items[giver].pop(first)
        items[taker].append(moved)
        if second:
            items[giver].append(items[taker].pop(second - 1))
        for rank in (giver, taker):
            items[rank].sort()
            loads[rank] = sum(costs[i] for i in items[rank])
    return items
