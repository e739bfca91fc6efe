"""Which sequences share a micro-batch, which rank trains them, and what they cost in FLOPs.

Owns the two assignments and the cost they weigh. Does not build tensors (batching.py), knows no
process group, and imports neither torch nor megatron: every rank computes the whole plan from the
same integers, so the functions are deterministic and no rank has to be told.

The two assignments want different weights. Memory grows with tokens, so micro-batches are filled
by length; time grows with FLOPs, so ranks are balanced by `StepCost`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A linear layer's backward is two products of the forward's size: for its input, for its weight.
_PASSES_TRAINED = 3
_PASSES_FROZEN = 1
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


@dataclass(frozen=True, slots=True)
class _Tower:
    """A vision tower's sizes, whatever its config calls them.

    Attributes:
        weights_a_patch: multiply-adds of its linear layers, a patch.
        num_full, num_windowed: layers.
    """

    weights_a_patch: int
    width: int
    num_full: int
    num_windowed: int
    window_patches: int

    @classmethod
    def of(cls, vision: Any) -> _Tower:
        # Everything up to the merger runs once a patch, the merger once in merge^2 patches.
        # Qwen2-VL's `hidden_size` is the decoder's, its own is `embed_dim`.
        width = getattr(vision, "embed_dim", None) or vision.hidden_size
        depth = getattr(vision, "depth", None) or vision.num_hidden_layers
        inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
        out = getattr(vision, "out_hidden_size", None) or vision.hidden_size
        merge = getattr(vision, "spatial_merge_size", 2)
        patch = vision.patch_size
        area = patch * patch if isinstance(patch, int) else patch[0] * patch[1]
        channels = getattr(vision, "in_channels", None) or vision.num_channels
        pixels = channels * getattr(vision, "temporal_patch_size", 1) * area
        # Only Qwen2.5-VL has windows, and a gated MLP.
        full = getattr(vision, "fullatt_block_indexes", None)
        block = 4 * width * width + (2 if full is None else 3) * width * inner
        merged = merge * merge * width
        num_mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
        merger = num_mergers * merged * (merged + out) // (merge * merge)
        weights = pixels * width + depth * block + merger
        if full is None:
            return cls(weights, width, depth, 0, 1)
        # A window's side is a whole number of merged patches.
        side = vision.window_size // (merge * patch) * merge
        return cls(weights, width, len(full), depth - len(full), side * side)


@dataclass(frozen=True, slots=True)
class StepCost:
    """FLOPs that a sequence or an image adds to one training step.

    Equation, for a sequence of L tokens, R of them the response's, and images of n patches:

        sequence = text_token * L + output_token * R + text_pair * L (L + 1) / 2
        images   = sum_n  n * (patch + window_pair * min(n, window_patches) + full_pair * n)

    A product of [a, b] and [b, c] counts 2abc. Counted are the matrix products and the attention of
    forward and backward. Not counted: norms, activations, rotary embedding, softmax, the optimizer,
    and whatever is computed twice (recomputed activations, flash attention's backward), as in the
    usual model-FLOPs utilisation. Only ratios matter to the balance.

    Attributes:
        text_token: of the decoder's linear layers, a token.
        output_token: of the output layer, a response token. Prompt tokens have no loss and no
            logits.
        text_pair: of attention, a (query, key) pair. The causal half, L (L + 1) / 2 pairs, is
            counted: what a fused kernel computes of a packed micro-batch, in which a sequence sees
            no other.
        patch: of the vision tower's linear layers (patch embedding, blocks, merger), a patch.
        window_pair: of the layers with window attention, a pair.
        full_pair: of the layers with full attention, a pair.
        window_patches: patches of a whole window.
    """

    text_token: float
    output_token: float
    text_pair: float
    patch: float
    window_pair: float
    full_pair: float
    window_patches: int

    @classmethod
    def of(cls, text_config: Any, vision_config: Any, trains_vision: bool) -> StepCost:
        """Read the sizes off a Hugging Face config.

        Args:
            text_config: of its decoder.
            vision_config: its `vision_config`; None for a text model.
            trains_vision: False if the tower is frozen: it lies before the decoder, so nothing
                needs its gradient and it costs its forward only.
        """
        text = text_config
        hidden, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or hidden // heads
        attention = 2 * hidden * heads * head + 2 * hidden * text.num_key_value_heads * head
        if getattr(text, "num_experts", None):
            mlp = text.num_experts_per_tok * text.moe_intermediate_size
        else:
            mlp = text.intermediate_size
        decoder = text.num_hidden_layers * (attention + 3 * hidden * mlp)
        tower = _Tower.of(vision_config) if vision_config is not None else _Tower(0, 0, 0, 0, 1)

        # A weight is one multiply-add a token, 2 FLOPs. A pair is two dot products (scores, values)
        # as wide as all heads together, 4 FLOPs a channel.
        passes = _PASSES_TRAINED if trains_vision else _PASSES_FROZEN
        return cls(
            text_token=2.0 * _PASSES_TRAINED * decoder,
            output_token=2.0 * _PASSES_TRAINED * hidden * text.vocab_size,
            text_pair=4.0 * _PASSES_TRAINED * text.num_hidden_layers * heads * head,
            patch=2.0 * passes * tower.weights_a_patch,
            window_pair=4.0 * passes * tower.num_windowed * tower.width,
            full_pair=4.0 * passes * tower.num_full * tower.width,
            window_patches=tower.window_patches,
        )

    def sequence(self, num_tokens: int, num_response_tokens: int) -> float:
        """FLOPs of a sequence in the decoder, its image tokens included but not their encoding.

        Args:
            num_tokens: prompt and response.
            num_response_tokens: those of the response.
        """
        pairs = num_tokens * (num_tokens + 1) / 2
        linear = self.text_token * num_tokens + self.output_token * num_response_tokens
        return linear + self.text_pair * pairs

    def images(self, num_patches_of_each: Sequence[int]) -> float:
        """FLOPs of encoding images once. Add it once for every time that they are encoded.

        Approximations, both upwards and together about 1% of a 7B model's tower at most: every
        window counts as whole, though those at an image's edge are smaller; and a trained patch
        embedding counts a gradient for the pixels, which nobody needs.

        Args:
            num_patches_of_each: patches (before merging) of each image; a video's frames count
                one by one, because attention stays within a frame.
        """
        return sum(
            n * (self.patch + self.window_pair * min(n, self.window_patches) + self.full_pair * n)
            for n in num_patches_of_each
        )
