"""The machines of a run: how its processes meet, whether its nodes go together, and what a machine
lacks. `launch` builds no model and starts no engine; the doctor's part loads no torch either.
"""
