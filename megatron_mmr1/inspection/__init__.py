"""What a data file holds, before anyone trains on it: sizes, bad rows, duplicates, contamination.

Rows are checked by the same functions as in training (data/), benchmarks read by the same readers
as in evaluation (evaluation/records.py). Owns fingerprints of texts and images, the rules by which
a row counts as a duplicate or as a benchmark's question, and the page.
"""
