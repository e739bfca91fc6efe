"""What a run will take, before it has a GPU: memory. Estimates of time come later."""
