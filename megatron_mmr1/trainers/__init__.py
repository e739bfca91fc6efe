"""The loops: grpo.py and sft.py compose the other rooms and contain no maths."""
