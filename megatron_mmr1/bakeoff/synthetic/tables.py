"""Stage 1 as rows of words, and as Markdown. page.py shows the same rows in HTML."""

from __future__ import annotations

from typing import NamedTuple

from megatron_mmr1.bakeoff.intervals import difference, mean_interval, points
from megatron_mmr1.bakeoff.synthetic.comparison import Comparison

POOL_WORDS = {
    "skewed": "Skewed: 45% trivial, 40% impossible, 15% frontier",
    "balanced": "Balanced: 30% trivial, 30% impossible, 40% frontier",
    "beta": "Beta(.25, .25)",
    "skewed_blind": "Skewed, with records that say nothing",
}
HEADER = (
    *("arm", "mixed groups, % of oracle", "minus uniform, points", "mixed rate, %"),
    *("frontier minus uniform, points", "final pass rate: pool, frontier, %", "coverage, %"),
    *("Brier", "scoring, discarded, % of rollouts"),
)


class Row(NamedTuple):
    """One arm on one pool, as shown; `is_null`: no difference from uniform in mixed groups."""

    cells: tuple[str, ...]
    is_null: bool


def rows(comparison: Comparison, pool: str) -> list[Row]:
    """Return a pool's table, in the order of the arms."""
    return [_row(comparison, pool, arm) for arm in comparison.values[pool]]


def _row(comparison: Comparison, pool: str, arm: str) -> Row:
    def mean(measure: str) -> float:
        return float(comparison.of(pool, arm, measure).mean())

    def above(measure: str) -> str:
        if arm == "uniform":
            return "-"
        return difference(comparison.above_uniform(pool, arm, measure))

    cells = (
        arm,
        points(mean_interval(comparison.mixed_share(pool, arm))),
        above("mixed_share"),
        f"{100 * mean('num_mixed') / mean('num_groups'):.1f}",
        above("frontier"),
        f"{100 * mean('pass_rate'):.1f}, {100 * mean('frontier'):.1f}",
        f"{100 * mean('coverage'):.0f}",
        f"{mean('brier'):.3f}",
        f"{100 * mean('scoring') / mean('generated'):.0f}, "
        f"{100 * mean('discarded') / mean('generated'):.0f}",
    )
    is_null = comparison.above_uniform(pool, arm, "mixed_share").is_null
    return Row(cells, is_null and arm != "uniform")


def notes(comparison: Comparison) -> str:
    """Say what was done, in one paragraph."""
    setting = comparison.setting
    return (
        f"{len(comparison.seeds)} seeds; mean and 95% interval (Student's t); differences are"
        " paired: the same seed has the same prompts and the same random walk. Every arm has the"
        f" same {setting['budget']:,} responses, scoring and discarded ones included;"
        f" {setting['batch_size']} prompts a step, {setting['group_size']} responses each. Mixed"
        " groups: those trained on, over what a sampler gets that knows the current pass rates."
        " The rest of it up to 100% is regret. Brier: of the predicted probability of a mixed"
        " group, over all prompts; the oracle's is what chance leaves. (null): the interval"
        " includes zero."
    )


LAW = (
    "No model is trained. A prompt's pass rate has a logit, which a step raises by 0.02 for each"
    " mixed group of that prompt and by 0.002 times the batch's share of mixed groups for all,"
    " plus a random walk of 0.05. Groups without variance move nothing. The records (12 strata)"
    " correlate with the pass rate by 0.5, the levels (5) by 0.9. The law is ours. A mixed group is"
    " worth the same in it however often its prompt came back, so it favours draws from few"
    " prompts; a real model learns few prompts by heart: what generalises is stage 2's question."
)


def table(comparison: Comparison, pool: str) -> str:
    """Return a pool's table in Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(row.cells) + " |" for row in rows(comparison, pool)]
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """Return stage 1's part of the README."""
    parts = [
        "## Stage 1: synthetic prompts with known pass rates",
        "    python tools/compare_samplers.py synthetic",
        LAW,
        notes(comparison),
    ]
    for pool in comparison.values:
        parts += [f"### {POOL_WORDS[pool]}", table(comparison, pool)]
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    parts.append(f"Versions: {versions}.")
    return "\n\n".join(parts) + "\n"
