"""Sampling responses: the engine protocol, vLLM in process, and the replay of recorded rollouts."""
