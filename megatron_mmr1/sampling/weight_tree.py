"""Draws in proportion to weights that change, in O(log P) a prompt: a tree of sums.

Owns the weights of P prompts and the draw from them. Does not own where they come from (scores.py),
nor the random numbers: the caller brings them, so that a draw is the same on every platform.

Level 0 are the weights, and a node of each level above is the sum of 8 below it, which fill one
cache line of 64 bytes: 8 + 1 + 1/8 + ... = 9.14 bytes a prompt, and 9 levels of sums for 100M. A
node is always recomputed from its children, never adjusted by a difference: nothing drifts, and the
same weights give the same tree, bit for bit, whatever the order of the updates.
"""

from __future__ import annotations

import numpy as np
from numba import njit

FAN_OUT = 8  # float64 in a cache line
MAX_WEIGHT = 1e298  # the sum of any 10 billion such weights is finite
_NO_INDICES = np.empty(0, np.int64)


class WeightTree:
    """The weights of P prompts, drawn in proportion.

    Args:
        weights: float64 [P], each in [0, 1e298]; copied.

    Raises:
        ValueError: a weight is negative, not finite or above 1e298.
    """

    def __init__(self, weights: np.ndarray):
        self._num_prompts = len(weights)
        self._starts = _level_starts(self._num_prompts)
        # One line more than needed, so that the first node can begin a line.
        self._memory = np.zeros(int(self._starts[-1]) + 1 + FAN_OUT)
        skipped = -self._memory.ctypes.data % 64 // 8
        self._nodes = self._memory[skipped : skipped + int(self._starts[-1]) + 1]
        self.set_all(weights)

    @property
    def weights(self) -> np.ndarray:
        """The weights in force, float64 [P]: a view that cannot be written to."""
        view = self._nodes[: self._num_prompts]
        view.flags.writeable = False
        return view

    @property
    def total(self) -> float:
        """The sum of all weights, as the tree has it."""
        return float(self._nodes[-1])

    @property
    def num_bytes(self) -> int:
        """Memory that the tree holds."""
        return self._memory.nbytes + self._starts.nbytes

    def set_all(self, weights: np.ndarray) -> None:
        """Replace all weights, in O(P).

        Raises:
            ValueError: as the class says, or not P weights; the old weights stay then.
        """
        weights = np.ascontiguousarray(weights, np.float64)
        if weights.shape != (self._num_prompts,):
            raise ValueError(
                f"weights have shape {weights.shape}; give one weight to each of the"
                f" {self._num_prompts} prompts"
            )
        _check_weights(weights, None)
        self._nodes[: self._num_prompts] = weights
        _sum_all(self._nodes, self._starts)

    def set(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Replace the weights of k prompts, in O(k log P).

        Args:
            indices: int64 [k]; where one occurs more than once, its last value counts.
            values: float64 [k].

        Raises:
            ValueError: an index is not in [0, P), a value is not as the class says, or there are
                not as many of both; the old weights stay then.
        """
        indices = self._checked(indices)
        values = np.array(values, np.float64)  # a copy: `values` may be a view of the tree
        if values.shape != indices.shape:
            raise ValueError(
                f"{indices.shape} indices and {values.shape} values; give one value to each index"
            )
        _check_weights(values, indices)
        _set(self._nodes, self._starts, indices, values)

    def draw(
        self,
        uniforms: np.ndarray,
        *,
        with_replacement: bool,
        excluded: np.ndarray = _NO_INDICES,
    ) -> np.ndarray:
        """Draw one prompt for each uniform number; the weights are afterwards what they were.

        With replacement, each draw is in proportion to the weights. Without, each is in proportion
        to the weights of the prompts not drawn yet: only the first is in proportion to all of them.
        A prompt of weight zero is never drawn. While it draws, prompts that may not be drawn have
        weight zero in the tree, so let no other thread read it meanwhile.

        Args:
            uniforms: float64 [k], each in [0, 1).
            excluded: int64 indices that may not be drawn.

        Returns:
            int64 [k] indices in drawing order; fewer when no positive weight is left, and none when
            all weights are zero.

        Raises:
            ValueError: a uniform number is not in [0, 1), or an index not in [0, P).
        """
        uniforms = np.ascontiguousarray(uniforms, np.float64)
        _check_uniforms(uniforms)
        excluded = self._checked(excluded)
        excluded_weights = self._nodes[excluded]
        drawn = np.full(len(uniforms), -1, np.int64)
        drawn_weights = np.zeros(len(uniforms))
        try:
            _set(self._nodes, self._starts, excluded, np.zeros(len(excluded)))
            _draw(self._nodes, self._starts, uniforms, with_replacement, drawn, drawn_weights)
        finally:
            is_drawn = drawn >= 0
            if not with_replacement:
                _set(self._nodes, self._starts, drawn[is_drawn], drawn_weights[is_drawn])
            _set(self._nodes, self._starts, excluded, excluded_weights)
        return drawn[is_drawn]

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        indices = np.ascontiguousarray(indices, np.int64)
        is_outside = (indices < 0) | (indices >= self._num_prompts)
        if is_outside.any():
            raise ValueError(
                f"index {indices[is_outside][0]} is not one of the {self._num_prompts} prompts;"
                f" use 0 to {self._num_prompts - 1}"
            )
        return indices


def _level_starts(num_leaves: int) -> np.ndarray:
    """Return where each level begins; each is padded to whole lines, and the last is the root."""
    starts, size = [0], num_leaves
    while len(starts) == 1 or size > 1:
        size = max(1, -(-size // FAN_OUT))
        starts.append(starts[-1] + FAN_OUT * size)
    return np.array(starts)


def _check_weights(weights: np.ndarray, indices: np.ndarray | None) -> None:
    position = _first_outside(weights, MAX_WEIGHT)
    if position >= 0:
        index = position if indices is None else indices[position]
        raise ValueError(
            f"weights[{index}]={weights[position]} cannot be drawn in proportion to; give a number"
            f" from 0 to {MAX_WEIGHT}"
        )


def _check_uniforms(uniforms: np.ndarray) -> None:
    position = _first_outside(uniforms, np.nextafter(1.0, 0.0))
    if position >= 0:
        raise ValueError(
            f"uniforms[{position}]={uniforms[position]} is not in [0, 1); draw them with"
            " Generator.random"
        )


@njit(cache=True, nogil=True)
def _first_outside(values: np.ndarray, highest: float) -> int:
    """Return the first position that is not in [0, highest], as NaN is not; -1 if none is."""
    for position in range(len(values)):
        if not 0.0 <= values[position] <= highest:
            return position
    return -1


@njit(cache=True, nogil=True)
def _sum_children(nodes: np.ndarray, first: int) -> float:
    """Add 8 neighbours, always in this order."""
    left = (nodes[first] + nodes[first + 1]) + (nodes[first + 2] + nodes[first + 3])
    right = (nodes[first + 4] + nodes[first + 5]) + (nodes[first + 6] + nodes[first + 7])
    return left + right


@njit(cache=True, nogil=True)
def _sum_all(nodes: np.ndarray, starts: np.ndarray) -> None:
    """Recompute every node above the leaves."""
    for level in range(1, len(starts)):
        below, start = starts[level - 1], starts[level]
        for node in range((start - below) // 8):
            nodes[start + node] = _sum_children(nodes, below + 8 * node)


@njit(cache=True, nogil=True)
def _set(nodes: np.ndarray, starts: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    """Write leaves, then recompute what is above them, level by level."""
    for k in range(len(indices)):
        nodes[indices[k]] = values[k]
    for level in range(1, len(starts)):
        below, start, shift = starts[level - 1], starts[level], 3 * level
        for index in indices:
            node = index >> shift
            nodes[start + node] = _sum_children(nodes, below + 8 * node)


@njit(cache=True, nogil=True)
def _descend(nodes: np.ndarray, starts: np.ndarray, target: float) -> int:
    """Return the leaf in whose stretch of the line of all positive weights `target` lies.

    Rounding may carry `target` past the last positive child. That child is taken then, and `target`
    not made smaller by it, so that it is past the end below, too.
    """
    node = 0
    for level in range(len(starts) - 2, -1, -1):
        first = starts[level] + 8 * node
        rest, chosen = target, -1
        for child in range(8):
            weight = float(nodes[first + child])
            if weight > 0.0:
                target, chosen = rest, child
                if rest < weight:
                    break
                rest -= weight
        node = 8 * node + chosen
    return node


@njit(cache=True, nogil=True)
def _draw(
    nodes: np.ndarray,
    starts: np.ndarray,
    uniforms: np.ndarray,
    with_replacement: bool,
    drawn: np.ndarray,
    drawn_weights: np.ndarray,
) -> None:
    """Fill `drawn`; without replacement each drawn leaf becomes 0 and its weight is kept."""
    root = len(nodes) - 1
    for k in range(len(uniforms)):
        if not nodes[root] > 0.0:
            return
        leaf = _descend(nodes, starts, uniforms[k] * nodes[root])
        drawn[k] = leaf
        if not with_replacement:
            drawn_weights[k] = nodes[leaf]
            nodes[leaf] = 0.0
            for level in range(1, len(starts)):
                node = leaf >> (3 * level)
                nodes[starts[level] + node] = _sum_children(nodes, starts[level - 1] + 8 * node)
