"""Rewards: the format check, the verifier, and the killable pool that runs it; imports no torch."""

from megatron_mmr1.rewards.accuracy import score
from megatron_mmr1.rewards.format import extract_answer, is_well_formed
from megatron_mmr1.rewards.pool import VerifierPool

__all__ = ["VerifierPool", "extract_answer", "is_well_formed", "score"]
