"""The training path's maths: softmax over a cut vocabulary, GRPO's loss, and their gradients.

Every function has two forms with one contract: Triton kernels on a GPU, closed-form torch on a CPU.
Both are tested against the definition in algorithms/, forward and backward, in float64.

- sequences.py: the responses of a micro-batch, checked on the host before anything is launched
- head.py: hidden states to loss and gradients, chunk by chunk; the entry of the trainer
- closed_form.py: the torch form
- triton_form.py: launches; sequence_kernel.py, row_kernels.py and token_terms.py: the kernels
- gates/: limits of the kernels that hold without a GPU; not imported by training
"""
