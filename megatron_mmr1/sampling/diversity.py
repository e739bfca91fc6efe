"""How much the G responses to one prompt differ: the measures behind TDS (arXiv:2509.21268).

Owns three measures, named in DIVERSITY_MEASURES, all in [0, 1] and higher = more diverse: one minus
self-BLEU-123 and distinct-n (both named by Alg. 1), and the pairwise edit distance of appendix A.3.
They see response tokens only: callers strip prompts and padding. How TDS enters the score of a
prompt is `scores.py`'s business.

Departure from the released code: it adds the raw self-BLEU, a similarity, with a positive weight,
and takes it over right-padded responses. `padded_self_bleu` is that number, a fourth name only for
the estimator that reproduces the released code.

The loops over tokens are compiled by numba at their first call, into a cache on disk, and release
the GIL, so that a thread can score one group while the engine generates the next.

Legend: G responses, T tokens of all responses end to end, U distinct n-grams, N = 3 orders.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import NamedTuple

import numpy as np

MAX_ORDER = 3
WORD_BITS = 64


def tds(responses: Sequence[Sequence[int]]) -> float:
    """Return 1 - self-BLEU-123: 0 = all identical, 1 = no response shares a 3-gram with another.

    TDS = 1 - mean over i of BLEU(response i; the other responses as references). The paper leaves
    the choices open; ours: one BLEU over 1-, 2- and 3-grams (the geometric mean of the clipped
    precisions with equal weights, not the mean of three BLEUs); brevity penalty exp(1 - r/c) for c
    < r, with r the closest reference length and the shorter one on a tie (nltk's sentence_bleu). No
    smoothing: it would keep disjoint groups below 1 and moves small groups by up to 0.14; so a
    response that shares no 3-gram with any other has BLEU 0. A response shorter than 3 tokens is
    judged on the orders that it has (nltk gives 0, and identical short responses would look
    diverse). An empty response has BLEU 1 if another is empty, else 0.

    Args:
        responses: G >= 2 sequences of int64 token ids, of any lengths, without padding.

    Raises:
        ValueError: fewer than two responses.
    """
    counts = _count_ngrams(*_end_to_end(responses))
    # a response's own order count divides its sum: an order that it is too short for adds log 1
    has_order_NG = counts.ngrams_NG > 0
    with np.errstate(divide="ignore"):
        log_precision_NG = np.log(counts.matches_NG / np.maximum(counts.ngrams_NG, 1))
    sum_G = np.where(has_order_NG, log_precision_NG, 0.0).sum(axis=0)
    num_orders_G = np.maximum(has_order_NG.sum(axis=0), 1)
    bleu_G = np.exp(sum_G / num_orders_G) * _brevity_penalty(counts.ngrams_NG[0])
    return float(1.0 - bleu_G.mean())


def distinct_n(responses: Sequence[Sequence[int]]) -> float:
    """Return distinct-n scaled to [0, 1]: 0 = all identical, 1 = no n-gram occurs twice.

    Distinct-n is the number of distinct n-grams of the group over the number of all its n-grams.
    Raw, identical responses have up to 1/G; so ours subtracts, above and below, the distinct
    n-grams of the one response that has most, as many as the group would have if the others added
    nothing: (distinct - most in one) / (all - most in one). A group that only repeats its richest
    response is 0, and repetition within a response lowers the score too. The mean is over the
    orders 1, 2, 3 that at least two responses are long enough for; with none, it is 0, because
    there is nothing to compare. An empty response adds nothing.

    Args:
        responses: G >= 2 sequences of int64 token ids, of any lengths, without padding.

    Raises:
        ValueError: fewer than two responses.
    """
    counts = _count_ngrams(*_end_to_end(responses))
    exists_N = (counts.ngrams_NG > 0).sum(axis=1) >= 2
    floor_N = counts.distinct_NG.max(axis=1)
    # two responses have n-grams, so all of them are more than any one response's
    room_N = counts.ngrams_NG.sum(axis=1) - floor_N
    scores = (counts.distinct_N - floor_N)[exists_N] / room_N[exists_N]
    return float(scores.mean()) if scores.size else 0.0


def edit_distance(responses: Sequence[Sequence[int]]) -> float:
    """Return appendix A.3's diversity: the mean over pairs of the squared normalised distance.

    A pair's distance is Levenshtein's (insertions, deletions and substitutions of a token, 1 each)
    over the length of the longer response: 0 = identical, 1 = nothing shared at any alignment. The
    mean is over the G(G - 1)/2 unordered pairs of different responses. Two empty responses have
    distance 0.

    Args:
        responses: G >= 2 sequences of int64 token ids, of any lengths, without padding.

    Raises:
        ValueError: fewer than two responses.
    """
    token_T, lengths_G = _end_to_end(responses)
    distance_GG = _levenshtein(*_number(token_T), lengths_G)
    longer_GG = np.maximum(np.maximum.outer(lengths_G, lengths_G), 1)
    pairs = np.triu_indices(len(lengths_G), k=1)
    return float(((distance_GG[pairs] / longer_GG[pairs]) ** 2).mean())


def padded_self_bleu(
    responses: Sequence[Sequence[int]], pad_id: int = 0, length: int | None = None
) -> float:
    """Return what the released code calls diversity: a SIMILARITY, 1 = identical, of padded rows.

    The mean over i of BLEU-123(row i; the other rows), each row a response right-padded to
    `length`. As there, nltk's smoothing method 1: an order without a match counts 0.1 matches, and
    a row that shares no token with any other has BLEU 0. Equal rows need no brevity penalty.

    Args:
        responses: G >= 2 sequences of int64 token ids.
        pad_id: the token that fills a row; released: the tokenizer's.
        length: tokens of a row, the longest response by default; released: the longest allowed.

    Raises:
        ValueError: fewer than two responses, or one longer than `length`.
    """
    longest = max(map(len, responses), default=0)
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"length={length} cuts a response of {longest} tokens; use that or more")
    rows = [[*response, *[pad_id] * (length - len(response))] for response in responses]
    counts = _count_ngrams(*_end_to_end(rows))
    precision_NG = np.maximum(counts.matches_NG, 0.1) / np.maximum(counts.ngrams_NG, 1)
    bleu_G = np.exp(np.log(precision_NG).mean(axis=0))
    return float(np.where(counts.matches_NG[0] > 0, bleu_G, 0.0).mean())


DIVERSITY_MEASURES: dict[str, Callable[[Sequence[Sequence[int]]], float]] = {
    "self_bleu": tds,
    "distinct_n": distinct_n,
    "edit_distance": edit_distance,
    "padded_self_bleu": padded_self_bleu,  # a similarity: estimator released_code alone may have it
}


class _NgramCounts(NamedTuple):
    ngrams_NG: np.ndarray  # of each response, repeats included
    matches_NG: np.ndarray  # of those, each n-gram at most as often as in any one other response
    distinct_NG: np.ndarray  # of each response
    distinct_N: np.ndarray  # of the whole group


def _end_to_end(responses: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens [T] and the lengths [G], both int64."""
    if len(responses) < 2:
        raise ValueError(
            f"a diversity needs at least 2 responses and got {len(responses)};"
            " use rollout.group_size of 2 or more"
        )
    lengths_G = np.array([len(response) for response in responses], dtype=np.int64)
    # array reads lists and tuples of ints faster than numpy does: a sixth of the time of `tds`
    tokens = bytearray().join(array("q", response) for response in responses)
    return np.frombuffer(tokens, dtype=np.int64), lengths_G


def _count_ngrams(flat_T: np.ndarray, lengths_G: np.ndarray) -> _NgramCounts:
    token_T, vocabulary = _number(flat_T)
    ngram_T, num_ngrams = token_T, vocabulary
    orders = []
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            # Name an n-gram by its first n - 1 tokens and its last one. Both names are below T, so
            # their pair fits an int64 whatever the vocabulary. Those across a seam are not counted.
            ngram_T, num_ngrams = _number(ngram_T[:-1] * vocabulary + token_T[order - 1 :])
        matches_G, distinct_G, distinct = _match(ngram_T, num_ngrams, lengths_G, order)
        orders.append((np.maximum(lengths_G - order + 1, 0), matches_G, distinct_G, distinct))
    return _NgramCounts(*(np.array(column) for column in zip(*orders, strict=True)))


def _brevity_penalty(lengths_G: np.ndarray) -> np.ndarray:
    """Return [G], against the closest other length; for an empty response 1 or 0, as in `tds`."""
    gap_GG = 2 * np.abs(lengths_G[:, None] - lengths_G) + (lengths_G > lengths_G[:, None])
    np.fill_diagonal(gap_GG, np.iinfo(gap_GG.dtype).max)
    closest_G = lengths_G[gap_GG.argmin(axis=1)]
    penalty_G = np.exp(np.minimum(1.0 - closest_G / np.maximum(lengths_G, 1), 0.0))
    return np.where(lengths_G == 0, closest_G == 0, penalty_G)


def _compiled_at_first_call[**P, R](kernel: Callable[P, R]) -> Callable[P, R]:
    """Decorate a loop for numba, whose import alone takes 0.6 s: the first call pays for it."""

    @cache
    def compiled() -> Callable[P, R]:
        import numba

        return numba.njit(cache=True, nogil=True)(kernel)

    @wraps(kernel)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return compiled()(*args, **kwargs)

    return call


@_compiled_at_first_call
def _number(key_T: np.ndarray) -> tuple[np.ndarray, int]:
    """Return [T], equal keys renamed to equal numbers 0, 1, 2, ..., and how many there are."""
    bits = 4
    while (1 << bits) < 2 * len(key_T):  # a hash table at most half full, so that probes are few
        bits += 1
    first_of_slot = np.full(1 << bits, -1, np.int32)  # where its key occurs first
    number_T = np.empty(len(key_T), np.int64)
    num_keys = 0
    for t in range(len(key_T)):
        # the top bits of a product with 2^64 / golden ratio: spreads consecutive keys
        product = np.uint64(key_T[t]) * np.uint64(0x9E3779B97F4A7C15)
        slot = np.int64(product >> np.uint64(64 - bits))
        while first_of_slot[slot] >= 0 and key_T[first_of_slot[slot]] != key_T[t]:
            slot = (slot + 1) & ((1 << bits) - 1)
        if first_of_slot[slot] < 0:
            first_of_slot[slot] = t
            number_T[t] = num_keys
            num_keys += 1
        else:
            number_T[t] = number_T[first_of_slot[slot]]
    return number_T, num_keys


@_compiled_at_first_call
def _match(
    ngram_T: np.ndarray, num_ngrams: int, lengths_G: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return one order's clipped matches [G], distinct n-grams of each response [G] and of all.

    A response has an n-gram at most as often as another one does, so that all of its occurrences
    match, unless it holds the highest count; then as many match as the second highest count.
    """
    count_U = np.zeros(num_ngrams, np.int32)  # in the response that visited it last
    visitor_U = np.full(num_ngrams, -1, np.int32)
    # the highest count in one response, whose it is, and the highest in the others
    first_U = np.zeros(num_ngrams, np.int32)
    owner_U = np.full(num_ngrams, -1, np.int32)
    second_U = np.zeros(num_ngrams, np.int32)
    distinct_G = np.zeros(len(lengths_G), np.int64)
    matches_G = np.maximum(lengths_G - order + 1, 0)
    start = 0
    for i in range(len(lengths_G)):
        for t in range(start, start + matches_G[i]):
            u = ngram_T[t]
            if visitor_U[u] != i:
                visitor_U[u] = i
                count_U[u] = 0
                distinct_G[i] += 1
            count_U[u] += 1
            if owner_U[u] == i:
                first_U[u] = count_U[u]
            elif count_U[u] > first_U[u]:
                second_U[u] = first_U[u]
                first_U[u] = count_U[u]
                owner_U[u] = i
            elif count_U[u] > second_U[u]:
                second_U[u] = count_U[u]
        start += lengths_G[i]
    distinct = 0
    for u in range(num_ngrams):
        if owner_U[u] >= 0:  # not across a seam
            distinct += 1
            matches_G[owner_U[u]] -= first_U[u] - second_U[u]
    return matches_G, distinct_G, distinct


@_compiled_at_first_call
def _levenshtein(token_T: np.ndarray, num_tokens: int, lengths_G: np.ndarray) -> np.ndarray:
    """Return [G, G], the edit distances of pairs i < j; zeros elsewhere.

    The table of the two-row recursion, 64 rows at a time: a column's steps down, each +1, 0 or -1,
    are the bits of two words (Myers, JACM 46(3), 1999; Hyyro's form). A block's last row, the steps
    to the right, is kept for the block below. Response i runs down, response j to the right.
    """
    num_responses = len(lengths_G)
    starts_G = np.cumsum(lengths_G) - lengths_G
    one = np.uint64(1)
    rows_U = np.zeros(num_tokens, np.uint64)  # in which rows of the block response i has the token
    plus_T = np.empty(len(token_T), np.uint8)  # the steps to the right above the block
    minus_T = np.empty(len(token_T), np.uint8)
    distance_GG = np.zeros((num_responses, num_responses), np.int64)
    for i in range(num_responses):
        plus_T[:] = 1  # above the table: j's first tokens all inserted
        minus_T[:] = 0
        for block in range(0, lengths_G[i], WORD_BITS):
            rows = token_T[starts_G[i] + block : starts_G[i] + min(block + WORD_BITS, lengths_G[i])]
            for row in range(len(rows)):
                rows_U[rows[row]] |= one << np.uint64(row)
            last_row = np.uint64(len(rows) - 1)
            for j in range(i + 1, num_responses):
                down_plus, down_minus = ~np.uint64(0), np.uint64(0)
                for t in range(starts_G[j], starts_G[j] + lengths_G[j]):
                    plus_above, minus_above = np.uint64(plus_T[t]), np.uint64(minus_T[t])
                    same = rows_U[token_T[t]]
                    keeps = same | down_minus
                    same |= minus_above
                    diagonal = (((same & down_plus) + down_plus) ^ down_plus) | same
                    right_plus = down_minus | ~(diagonal | down_plus)
                    right_minus = down_plus & diagonal
                    plus_T[t] = (right_plus >> last_row) & one
                    minus_T[t] = (right_minus >> last_row) & one
                    right_plus = (right_plus << one) | plus_above
                    right_minus = (right_minus << one) | minus_above
                    down_plus = right_minus | ~(keeps | right_plus)
                    down_minus = right_plus & keeps
            for token in rows:
                rows_U[token] = 0
        for j in range(i + 1, num_responses):
            distance = lengths_G[i]
            for t in range(starts_G[j], starts_G[j] + lengths_G[j]):
                distance += np.int64(plus_T[t]) - np.int64(minus_T[t])
            distance_GG[i, j] = distance
    return distance_GG
