"""What a reward loses for repetition and for length, as plain functions of the sampled tokens.

Both are off by default, and neither touches a verdict: pass rates, VAS statistics and the choice of
groups in dynamic sampling are of what the verifier says alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def repetition_share(token_ids: Sequence[Hashable], ngram: int) -> float:
    """Return the share of a response's n-grams that it had before, in [0, 1).

    Equation: 1 - |distinct n-grams| / (T - n + 1) for T tokens; 0 for T < n.

    A plain definition of our own: the share is of the whole response, since GRPO has one reward a
    response. (arXiv:2502.03373 penalises the tokens of each repeated n-gram instead.)

    Args:
        token_ids: [T], as sampled.
        ngram: n, at least 1. Long ones (20 and more) spare the phrases that reasoning repeats.
    """
    count = len(token_ids) - ngram + 1
    if count < 1:
        return 0.0
    distinct = {tuple(token_ids[i : i + ngram]) for i in range(count)}
    return 1 - len(distinct) / count


def overlong_share(num_tokens: int, max_tokens: int, cache_tokens: int) -> float:
    """Return how far a response is into the last `cache_tokens` before the limit, in [0, 1].

    Equation (arXiv:2503.14476, eq. 13, without its sign): 0 for |y| <= L_max - L_cache, then
    (|y| - (L_max - L_cache)) / L_cache, and 1 from L_max on.

    Args:
        num_tokens: |y|, the end-of-turn token included.
        max_tokens: L_max, rollout.max_response_tokens.
        cache_tokens: L_cache, from 1 to `max_tokens`.
    """
    return min(max((num_tokens - (max_tokens - cache_tokens)) / cache_tokens, 0.0), 1.0)
