"""The readable definition of the maths, in torch: advantages.py and grpo_loss.py.

Everything that computes the same faster is tested against this room in float64.
"""
