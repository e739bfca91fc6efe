"""Imports math-verify and runs its parser, so that a process forked from this one starts ready.

The first sine, logarithm or set costs a second of imports and of the parser's own tables, for which
no deadline should pay. Imported for its effect, by the process that workers are forked from.
"""

from __future__ import annotations

import logging

from megatron_mmr1.rewards.accuracy import judge

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timers are off
for _gold, _answer in (
    (r"\frac{x^2}{4}+\sqrt{y}=1", r"\sqrt{y}+\frac{x^2}{4}=1"),
    (r"\sin 2x", r"2\sin x\cos x"),
    (r"\log_2 8+\cos 60^\circ", r"2\ln 2"),
    (r"[1, \infty)", r"[1, \infty+x)"),
    ("5!", "5x"),
):
    judge(f"<answer>\\boxed{{{_answer}}}</answer>", _gold)
