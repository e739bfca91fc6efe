"""Bringing the policy's weights to the rollout engine."""

from megatron_mmr1.weight_sync.sync import WeightSync

__all__ = ["WeightSync"]
