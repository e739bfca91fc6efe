"""Stage 2: the real trainer on the embedded task.

- pools.py: prompts sorted by what the cold start makes of them
- runs.py: what is compared, and the runs
- analysis.py: choice of the learning rate, curves, intervals; page.py: Markdown and HTML
"""
