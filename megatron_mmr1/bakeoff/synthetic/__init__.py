"""Stage 1: prompts whose pass rates are known and move.

- pools.py: the prompts; policy.py: how their pass rates move, and what groups come of them
- simulation.py: one arm on one pool until the budget is spent
- arms.py: what is compared
- comparison.py: all of it over seeds
- tables.py, page.py: numbers as Markdown and HTML
"""
