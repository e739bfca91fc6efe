"""What can be said of the Triton kernels without a GPU, as gates: a number and its limit.

- paths.py: the ways through triton_form.py that the trainer takes, on tensors of any size
- launches.py: what they would launch, as Triton sees it: recorded, not run
- machine_code.py: a launch compiled for an architecture: registers, spills, loops, accesses
- compiled.py: gates on that code, and on one compilation for all lengths
- counted.py: gates on bytes and launches, counted in Triton's interpreter (a process of its own)
- table.py: a gate's result, and all of them as text

Run by tools/check_kernel_gates.py. Leans on insides of Triton 3.7 (its binder and its interpreter's
builder), which requirements.txt pins.
"""
