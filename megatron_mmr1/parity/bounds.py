"""How far two implementations of the same numbers may be from one another, and why."""

# Float32: the same numbers, added in another order. Largest difference of a log-prob in nats; of
# the loss, whose terms are of order 1; of a gradient tensor, norm of the difference over norm.
LOGPROB_BOUND = 1e-5
LOSS_BOUND = 1e-5
GRADIENT_BOUND = 1e-5
# Two outcomes that are each within a bound of Hugging Face may be twice as far from one another.
# The matrix, on random weights, keeps the bound there too; trained weights may need the room.
APART = 2.0
# bfloat16: mean error against float32 over Hugging Face's own. Both round at every layer, in
# different places, so that neither error bounds the other.
BFLOAT16_BOUND = 1.5
# A gradient tensor smaller than this part of all gradients is rounding in float32: what is zero in
# theory. It is held against all of them.
ROUNDING = 1e-6
