"""What the verifier gets wrong on labelled answers, against limits that the released rules fail.

`tools/measure_verifier.py` prints the same figures by kind.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_mmr1.rewards import accuracy, released_code

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import measure_verifier as measure

SETS = {"adversarial": measure.ADVERSARIAL, "held out": measure.HELD_OUT}
MAX_FALSE_NEGATIVES = 0.02
# What a set must have, by kind or by what its rows hold, and how many rows at least.
BY_KIND = {
    "adversarial": [
        *("substring", "enumeration", "units", "percent", "sets_intervals_tuples", "injection"),
        *("multiple_choice", "equivalent_forms", "pathological", "broken_gold"),
    ],
    "held out": [
        *("numbers", "enumeration_hedging", "units", "percent", "sets_intervals_tuples"),
        *("multiple_choice", "algebra", "pathological", "broken_gold"),
    ],
}
BY_CONTENT = {
    "fraction": r"\\[dt]?frac|[0-9]/[0-9]",
    "LaTeX": r"\\(?!boxed)[a-z]{2,}",
    "set": r"\\\{",
    "interval": r"[\[(].*\\infty",
    "root": r"\\sqrt",
}


@pytest.fixture(scope="module")
def rows():
    return {name: measure.read_rows(path) for name, path in SETS.items()}


@pytest.fixture(scope="module")
def ours(rows):
    every = [row for some in rows.values() for row in some]
    verdicts = measure.judged(every, accuracy.judge, cpu_s=1.0, num_workers=2)
    cut = len(rows["adversarial"])
    return {"adversarial": verdicts[:cut], "held out": verdicts[cut:]}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_large_and_has_every_kind_of_answer(rows, name):
    assert len(rows[name]) >= 300
    assert len({row["id"] for row in rows[name]}) == len(rows[name])
    counts = Counter(row["kind"] for row in rows[name])
    assert all(counts[kind] >= 7 for kind in BY_KIND[name])
    for pattern in BY_CONTENT.values():
        held = [row for row in rows[name] if re.search(pattern, row["gold"] + row["response"])]
        assert len(held) >= 5, pattern
    labels = Counter(row["expected"] for row in rows[name])
    assert labels["correct"] >= 150 and labels["wrong"] >= 150


@pytest.mark.parametrize("name", SETS)
def test_no_answer_is_credited_that_is_not_correct_and_few_correct_ones_are_refused(
    rows, ours, name
):
    found = measure.rates(rows[name], ours[name])
    assert found.false_positives == 0
    assert found.false_negatives <= MAX_FALSE_NEGATIVES * found.num_correct


@pytest.mark.parametrize("name", SETS)
def test_no_broken_gold_is_held_against_an_answer(rows, ours, name):
    for row, (outcome, _) in zip(rows[name], ours[name], strict=True):
        if row["kind"] == "broken_gold" and row["expected"] == "could_not_judge":
            assert outcome == "could_not_judge", row["id"]


@pytest.mark.parametrize("name", SETS)
def test_the_released_rules_fail_the_same_limits(rows, name):
    """Else the sets, or the limits, would show nothing."""
    ordinary = [row for row in rows[name] if row["kind"] != "pathological"]
    verdicts = measure.judged(ordinary, released_code.judge, cpu_s=1.0, num_workers=2)
    found = measure.rates(ordinary, verdicts)
    assert found.false_positives > 0.2 * found.num_not_correct
    assert found.false_negatives > MAX_FALSE_NEGATIVES * found.num_correct
