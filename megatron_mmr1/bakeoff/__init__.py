"""Samplers compared at equal numbers of generated responses; composes sampling, trains no model.

Stage 1, synthetic: prompts whose pass rates are known and move.

- pools.py: the prompts; policy.py: how their pass rates move, and what groups come of them
- simulation.py: one arm on one pool until the budget is spent
- arms.py: what is compared
- comparison.py: all of it over seeds; tuning.py: the search for defaults
- intervals.py, tables.py, page.py: numbers to intervals, Markdown and HTML
"""
