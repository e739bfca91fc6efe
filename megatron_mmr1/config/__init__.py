"""Typed configs, their checks and the run folder. Imports no torch, megatron or vllm."""
