"""MMR1 on Megatron-Core: cold start, GRPO with Variance-Aware Sampling,
evaluation (arXiv:2509.21268).
"""

__version__ = "0.1.0"
