"""Accuracy of a benchmark run with intervals, by group, and the paired comparison of two runs.

Owns the resampling: questions of one cluster (MathVerse's versions of a problem) are drawn
together, so that five versions do not pass for five independent questions. An unscored response is
in no denominator and is counted; because the scored ones are then a selection (MathVerse: a rule
finds equal answers more easily than different ones), every accuracy comes with the two bounds that
hold whatever a judge would say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from megatron_mmr1.evaluation.questions import Answered, Outcome

Rule = Literal["strict", "compat"]
Floats = NDArray[np.float64]

NUM_RESAMPLES = 9_999
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of correct among scored responses; NaN where none is scored.

    Attributes:
        low, high: bootstrap percentile interval of `value` (95%); NaN with fewer than two clusters.
            Where all are right, or all wrong, resampling shows no spread, and it is the exact
            interval of Clopper and Pearson (1934) with a cluster as one trial.
        lowest, highest: the share of correct among all, every unscored one wrong, or correct.
    """

    value: float
    low: float
    high: float
    num_correct: int
    num_wrong: int
    num_unscored: int
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs on the questions that are scored in both.

    Attributes:
        difference: accuracy of the second run minus accuracy of the first.
        low, high: bootstrap percentile interval of it (95%), with the same draws for both runs.
        p_value: two-sided; of the hypothesis that the runs are exchangeable in every cluster
            (random sign flips of the clusters' differences; without clusters McNemar's test).
        num_questions, num_clusters: that were compared.
        num_left_out: in one run only, or unscored in a run.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_questions: int
    num_clusters: int
    num_left_out: int


def accuracy(answered: Sequence[Answered], rule: Rule, seed: int = 0) -> Accuracy:
    """Return the accuracy of a run under one rule.

    Equation: value = sum_c correct_c / sum_c scored_c over clusters c; an interval resamples c.
    """
    correct: defaultdict[str, int] = defaultdict(int)
    scored: defaultdict[str, int] = defaultdict(int)
    outcomes = [_outcome(item, rule) for item in answered]
    for item, outcome in zip(answered, outcomes, strict=True):
        if outcome != "unscored":
            correct[item.question.cluster] += outcome == "correct"
            scored[item.question.cluster] += 1
    clusters = sorted(scored)
    low, high = _interval([correct[c] for c in clusters], [scored[c] for c in clusters], seed)
    if low == high and low in (0.0, 1.0):
        num_right = len(clusters) if low == 1 else 0
        exact = stats.binomtest(num_right, len(clusters)).proportion_ci(CONFIDENCE)
        low, high = float(exact.low), float(exact.high)
    num_correct, num_wrong = outcomes.count("correct"), outcomes.count("wrong")
    num_unscored = outcomes.count("unscored")
    return Accuracy(
        _share(num_correct, num_correct + num_wrong),
        low,
        high,
        num_correct,
        num_wrong,
        num_unscored,
        _share(num_correct, len(outcomes)),
        _share(num_correct + num_unscored, len(outcomes)),
    )


def accuracy_by_group(
    answered: Sequence[Answered], rule: Rule, seed: int = 0
) -> dict[str, dict[str, Accuracy]]:
    """Return accuracy by each value of each group: {"skills": {"algebraic reasoning": ...}}.

    A question with several values (MathVista's skills) counts under each.
    """
    members: defaultdict[str, defaultdict[str, list[Answered]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for item in answered:
        for group, values in item.question.groups.items():
            for value in values:
                members[group][value].append(item)
    return {
        group: {value: accuracy(items, rule, seed) for value, items in sorted(values.items())}
        for group, values in sorted(members.items())
    }


def compare(
    first: Sequence[Answered], second: Sequence[Answered], rule: Rule, seed: int = 0
) -> Comparison:
    """Compare two runs question by question.

    Raises:
        ValueError: no question is scored in both, or one is answered twice in a run.
    """
    before, after = _correct_by_id(first, rule), _correct_by_id(second, rule)
    cluster_of = {item.question.question_id: item.question.cluster for item in first}
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError("no question is scored in both runs; are they of the same benchmark?")
    differences: defaultdict[str, int] = defaultdict(int)
    sizes: defaultdict[str, int] = defaultdict(int)
    for question_id in common:
        differences[cluster_of[question_id]] += after[question_id] - before[question_id]
        sizes[cluster_of[question_id]] += 1
    clusters = sorted(sizes)
    difference_C = [differences[c] for c in clusters]
    low, high = _interval(difference_C, [sizes[c] for c in clusters], seed)
    everything = {item.question.question_id for item in (*first, *second)}
    return Comparison(
        sum(difference_C) / len(common),
        low,
        high,
        _sign_flip_p_value(difference_C, seed),
        len(common),
        len(clusters),
        len(everything) - len(common),
    )


def _interval(
    numerator_C: Sequence[int], denominator_C: Sequence[int], seed: int
) -> tuple[float, float]:
    """Bootstrap a ratio of sums over clusters."""
    if len(numerator_C) < 2:
        return math.nan, math.nan

    def ratio(numerator: Floats, denominator: Floats, axis: int) -> Floats:
        return numerator.sum(axis=axis) / denominator.sum(axis=axis)

    result = stats.bootstrap(
        (np.asarray(numerator_C, float), np.asarray(denominator_C, float)),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=500,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _sign_flip_p_value(difference_C: Sequence[int], seed: int) -> float:
    """Exact where all non-zero differences are of one size, or few; else random flips."""
    moved = np.asarray([d for d in difference_C if d], float)
    if not moved.size:
        return 1.0
    if len(set(abs(moved))) == 1:
        return float(stats.binomtest(int((moved > 0).sum()), moved.size, 0.5).pvalue)
    result = stats.permutation_test(
        (moved,),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _outcome(item: Answered, rule: Rule) -> Outcome:
    scores = item.scores
    return scores.strict.outcome if rule == "strict" else scores.compat.outcome


def _correct_by_id(answered: Sequence[Answered], rule: Rule) -> dict[str, bool]:
    outcomes = {item.question.question_id: _outcome(item, rule) for item in answered}
    if len(outcomes) < len(answered):
        raise ValueError("a question is answered twice in a run; compare one response a question")
    return {
        name: outcome == "correct" for name, outcome in outcomes.items() if outcome != "unscored"
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
