"""What a run leaves for people: metrics, prompt statistics, rollouts, times, progress, report.

Nothing here imports torch, megatron or vllm, so that `python -m megatron_mmr1.report` starts fast.
Only rank 0 calls this room.
"""
