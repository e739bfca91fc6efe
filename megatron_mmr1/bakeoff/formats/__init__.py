"""Number formats compared on the tiny model, on a CPU, where FP8 is emulated
(backend/fp8_emulation.py).
"""
