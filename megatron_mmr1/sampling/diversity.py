"""TDS, a group's trajectory diversity score (arXiv:2509.21268, Alg. 1): 1 - self-BLEU-123.

Departure from the released code: it adds the raw self-BLEU, a similarity, with a positive weight,
and takes it over right-padded responses; here it is one minus that, over response tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_ORDER = 3


def tds(responses: Sequence[Sequence[int]]) -> float:
    """Return how much the G responses to one prompt differ: 0 = all identical, 1 = nothing shared.

    TDS = 1 - mean over i of BLEU(response i; the other responses as references). The paper leaves
    the choices open; ours: one BLEU over 1-, 2- and 3-grams (the geometric mean of the clipped
    precisions with equal weights, not the mean of three BLEUs); brevity penalty exp(1 - r/c) for c
    < r, with r the closest reference length and the shorter one on a tie (nltk's sentence_bleu). No
    smoothing: it would keep disjoint groups below 1 and moves small groups by up to 0.14; so a
    response that shares no 3-gram with any other has BLEU 0. A response shorter than 3 tokens is
    judged on the orders that it has (nltk gives 0, and identical short responses would look
    diverse). An empty response has BLEU 1 if another is empty, else 0.

    Args:
        responses: G >= 2 sequences of token ids, of any lengths, without padding.

    Raises:
        ValueError: fewer than two responses.
    """
    num_responses = len(responses)
    if num_responses < 2:
        raise ValueError(
            f"a diversity needs at least 2 responses and got {num_responses};"
            " use rollout.group_size of 2 or more"
        )
    # Legend: G responses, T tokens of all responses end to end, U distinct n-grams.
    lengths_G = np.array([len(response) for response in responses])
    owner_T = np.repeat(np.arange(num_responses), lengths_G)
    flat_T = np.concatenate([np.asarray(response, dtype=np.int64) for response in responses])
    vocabulary, token_T = np.unique(flat_T, return_inverse=True)
    log_precision_G = np.zeros(num_responses)
    ngram_T = token_T
    for order in range(1, MAX_ORDER + 1):
        if order > 1:  # name an n-gram by its first n - 1 tokens and its last: ids stay small
            pairs_T = ngram_T[:-1] * len(vocabulary) + token_T[order - 1 :]
            ngram_T = np.unique(pairs_T, return_inverse=True)[1]
        first_owner = owner_T[: len(ngram_T)]
        is_inside = first_owner == owner_T[order - 1 :]  # not across the seam of two responses
        matches_G = _clipped_matches(first_owner[is_inside], ngram_T[is_inside], num_responses)
        precision_G = matches_G / np.maximum(lengths_G - order + 1, 1)
        with np.errstate(divide="ignore"):
            log_precision_G += np.where(lengths_G >= order, np.log(precision_G), 0.0)
    num_orders_G = np.clip(lengths_G, 1, MAX_ORDER)
    bleu_G = np.exp(log_precision_G / num_orders_G) * _brevity_penalty(lengths_G)
    return float(1.0 - bleu_G.mean())


def _clipped_matches(owner: np.ndarray, ngram: np.ndarray, num_responses: int) -> np.ndarray:
    """Return [G]: the n-grams of each response, each at most as often as in any one other."""
    num_ngrams = int(ngram.max()) + 1 if len(ngram) else 0
    flat = np.bincount(owner * num_ngrams + ngram, minlength=num_responses * num_ngrams)
    counts_GU = flat.reshape(num_responses, num_ngrams)
    second_U, first_U = np.partition(counts_GU, -2, axis=0)[-2:]
    # the highest count among the others; when two share the first place, second == first
    most_elsewhere_GU = np.where(counts_GU == first_U, second_U, first_U)
    return np.minimum(counts_GU, most_elsewhere_GU).sum(axis=1)


def _brevity_penalty(lengths_G: np.ndarray) -> np.ndarray:
    """Return [G], against the closest other length; for an empty response 1 or 0, as in `tds`."""
    gap_GG = 2 * np.abs(lengths_G[:, None] - lengths_G) + (lengths_G > lengths_G[:, None])
    np.fill_diagonal(gap_GG, np.iinfo(gap_GG.dtype).max)
    closest_G = lengths_G[gap_GG.argmin(axis=1)]
    penalty_G = np.exp(np.minimum(1.0 - closest_G / np.maximum(lengths_G, 1), 0.0))
    return np.where(lengths_G == 0, closest_G == 0, penalty_G)
