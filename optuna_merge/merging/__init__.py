"""From a recipe and checkpoints to merged tensors, a model folder or a mergekit file."""
