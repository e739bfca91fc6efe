"""One GRPO step of ours beside one of TRL's GRPOTrainer: same model, batch, seeds and machine."""
