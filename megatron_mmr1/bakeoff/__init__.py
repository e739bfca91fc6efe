"""Samplers compared at equal numbers of generated responses.

- synthetic/: prompts whose pass rates are known and move; no model is trained
- trained/: the real trainer on the embedded task
- intervals.py: intervals over seeds; page.py: both stages on one page
"""
