"""From a response to its two scores; one file a benchmark, each a pure function.

Owns where the box is looked for (extraction.py), each benchmark's rules, and the worker processes
that bound how long one may take (pool.py). Says whether two mathematical answers are equal only
through rewards/. Nothing of a response is ever passed to `eval`.
"""

from megatron_mmr1.evaluation.scoring.extraction import extract
from megatron_mmr1.evaluation.scoring.pool import score_all
from megatron_mmr1.evaluation.scoring.scorers import SCORERS, score

__all__ = ["SCORERS", "extract", "score", "score_all"]
