"""The only room that imports megatron.core: the policy, its model, optimizer and checkpoints."""
