"""The parity check: log-probs, loss and gradients of every parallel layout against Hugging Face."""
