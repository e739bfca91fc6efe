"""Replies to scored answers, and those to the numbers of `summary.json`.

Owns the form of the summary, and what is put to a judge: answers that no rule can decide. Accuracy
and intervals are statistics.py's, rules are scoring/'s, the judge is rewards/judge.py's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_mmr1.config.schema import RewardConfig
from megatron_mmr1.evaluation.generation import Contents
from megatron_mmr1.evaluation.journal import Journal
from megatron_mmr1.evaluation.questions import Answered, Extracted, Question, Score, Scores
from megatron_mmr1.evaluation.scoring import extract, score_all
from megatron_mmr1.evaluation.statistics import Rule, accuracy, accuracy_by_group
from megatron_mmr1.rewards import is_well_formed
from megatron_mmr1.rewards.judge import Judge

RULES: tuple[Rule, ...] = ("strict", "compat")


def score_replies(contents: Contents, journal: Journal, reward: RewardConfig) -> list[Answered]:
    """Score every response, in the order of the questions; each within a hard deadline.

    With `reward.judge_url` a judge is asked about what the rules leave unscored.
    """
    pairs = [
        (question, index, response)
        for question in contents.questions
        if question.question_id in journal.replies
        for index, response in enumerate(journal.replies[question.question_id].responses)
    ]
    extracted = [extract(response.text, question.benchmark) for question, _, response in pairs]
    tasks = [(found, pair[0]) for found, pair in zip(extracted, pairs, strict=True)]
    scores = score_all(tasks, reward.deadline_s, reward.num_workers)
    if reward.judge_url:
        with Judge(reward) as judge:
            scores = judged(tasks, scores, judge)
    return [
        Answered(
            question,
            contents.prompts[question.question_id],
            response.text,
            found,
            score,
            contents.digests[question.question_id],
            index,
            response.num_tokens,
            response.is_cut_off,
        )
        for (question, index, response), found, score in zip(pairs, extracted, scores, strict=True)
    ]


def judged(
    tasks: Sequence[tuple[Extracted, Question]], scores: Sequence[Scores], judge: Judge
) -> list[Scores]:
    """Ask a judge about each unscored answer; what it does not decide stays unscored, and says why.

    Args:
        tasks: what was extracted from each response, and its question.
        scores: of the rules.
    """
    asked = {
        (question.text, question.answer, answer)
        for (extracted, question), of_rules in zip(tasks, scores, strict=True)
        for answer, score in zip(extracted, of_rules, strict=True)
        if score.outcome == "unscored" and answer is not None
    }
    futures = {texts: judge.submit(*texts) for texts in sorted(asked)}
    verdicts = {texts: judge.result(future) for texts, future in futures.items()}

    def score_of(answer: str | None, question: Question, score: Score) -> Score:
        if score.outcome != "unscored" or answer is None:
            return score
        outcome, reason = verdicts[question.text, question.answer, answer]
        if outcome == "could_not_judge":
            return Score("unscored", f"{score.reason}; {reason}")
        return Score(outcome, "the judge's verdict")

    return [
        Scores(
            score_of(extracted.strict, question, of_rules.strict),
            score_of(extracted.compat, question, of_rules.compat),
        )
        for (extracted, question), of_rules in zip(tasks, scores, strict=True)
    ]


def summarize(answered: Sequence[Answered], contents: Contents, num_refused: int) -> dict[str, Any]:
    """Return the numbers of a run: plain values, null where there is none.

    `overall` and each value of `groups` hold `num_responses`, `num_cut_off` and one
    `statistics.Accuracy` a rule; `unscored_reasons` counts the strict rule's most frequent ones.
    """
    members: dict[str, dict[str, list[Answered]]] = {}
    for item in answered:
        for group, values in item.question.groups.items():
            for value in values:
                members.setdefault(group, {}).setdefault(value, []).append(item)
    by_rule = {rule: accuracy_by_group(answered, rule) for rule in RULES}
    groups = {
        group: {
            value: _counts(items) | {rule: _plain(by_rule[rule][group][value]) for rule in RULES}
            for value, items in sorted(values.items())
        }
        for group, values in sorted(members.items())
    }
    reasons = Counter(
        item.scores.strict.reason for item in answered if item.scores.strict.outcome == "unscored"
    )
    questions = "\n".join(sorted(contents.digests.values()))
    return {
        "num_questions": len(contents.questions),
        "num_bad_rows": len(contents.bad_rows) + num_refused,
        "questions_sha256": hashlib.sha256(questions.encode()).hexdigest(),
        "num_well_formed": sum(is_well_formed(item.response) for item in answered),
        "unscored_reasons": dict(reasons.most_common(5)),
        "overall": _counts(answered) | {rule: _plain(accuracy(answered, rule)) for rule in RULES},
        "groups": groups,
    }


def _counts(answered: Sequence[Answered]) -> dict[str, Any]:
    tokens = sum(item.num_tokens for item in answered)
    return {
        "num_responses": len(answered),
        "num_cut_off": sum(item.is_cut_off for item in answered),
        "mean_tokens": tokens / len(answered) if answered else None,
    }


def _plain(value: Any) -> dict[str, Any]:
    """A dataclass of numbers as a dict; NaN, which JSON lacks, is None."""
    return {
        name: None if isinstance(number, float) and math.isnan(number) else number
        for name, number in dataclasses.asdict(value).items()
    }
