"""Measure the diversity measures: nltk's self-BLEU beside ours, and the time of the other two.

Usage: python tools/measure_diversity.py [--repetitions 9] [--seed 0]

Simulated groups, no model: the responses are edited copies of one text of Zipf-distributed token
ids below 151,936, each with a share of 0 to 50% of its tokens drawn anew. Every repetition takes a
fresh group and gives it to all measures in turn; the first, which compiles, is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from nltk.translate.bleu_score import sentence_bleu

from megatron_mmr1.sampling.diversity import DIVERSITY_MEASURES

SHAPES = ((16, 1000), (8, 200))  # responses, tokens of each
VOCABULARY = 151_936
Group = Sequence[Sequence[int]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    measures = {"self_bleu, nltk": _nltk_tds, **DIVERSITY_MEASURES}
    print("| group | measure | median ms | best ms | nltk / ours, medians | largest difference |")
    print("|---|---|---|---|---|---|")
    for num_responses, num_tokens in SHAPES:
        times_ms = {name: [] for name in measures}
        differences = []
        for repetition in range(args.repetitions + 1):
            group = _group(rng, num_responses, num_tokens)
            values = {}
            for name, measure in measures.items():
                values[name], ms = _timed(measure, group)
                if repetition > 0:
                    times_ms[name].append(ms)
            differences.append(abs(values["self_bleu"] - values["self_bleu, nltk"]))
        medians = {name: statistics.median(times) for name, times in times_ms.items()}
        for name, times in times_ms.items():
            line = f"| {num_responses} x {num_tokens} | {name} | {medians[name]:.3f} "
            line += f"| {min(times):.3f} "
            if name == "self_bleu":
                ratio = medians["self_bleu, nltk"] / medians[name]
                line += f"| {ratio:.0f} | {max(differences):.1e} |"
            else:
                line += "| - | - |"
            print(line)


def _group(rng: np.random.Generator, num_responses: int, num_tokens: int) -> Group:
    """Tuples, as a rollout carries its tokens."""
    text = rng.zipf(1.2, num_tokens) % VOCABULARY
    group = []
    for share in rng.uniform(0, 0.5, num_responses):
        drawn = rng.zipf(1.2, num_tokens) % VOCABULARY
        group.append(tuple(np.where(rng.random(num_tokens) < share, drawn, text).tolist()))
    return group


def _timed(measure: Callable[[Group], float], group: Group) -> tuple[float, float]:
    """Return the value and the milliseconds."""
    start = time.perf_counter()
    value = measure(group)
    return value, 1e3 * (time.perf_counter() - start)


def _nltk_tds(group: Group) -> float:
    thirds = (1 / 3, 1 / 3, 1 / 3)
    bleus = [
        sentence_bleu([*group[:i], *group[i + 1 :]], response, thirds)
        for i, response in enumerate(group)
    ]
    return 1 - float(np.mean(bleus))


if __name__ == "__main__":
    main()
