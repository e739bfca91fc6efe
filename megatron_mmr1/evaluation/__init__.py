"""Benchmark readers and scoring; the graders come from rewards/."""
