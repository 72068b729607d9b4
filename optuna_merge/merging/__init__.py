"""A recipe and checkpoints to merged tensors, a model folder or a mergekit file."""
